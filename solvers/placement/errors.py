"""What is wrong with an input, said in one sentence: what was given, what was expected, what to do."""

from __future__ import annotations


class PlacementError(ValueError):
    """A trace, cluster, plan or constraint that no valid placement can be made from."""
