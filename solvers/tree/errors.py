"""What is wrong with the numbers that a tree was to be picked from."""

from __future__ import annotations


class TreeError(ValueError):
    """Acceptance rates, latencies or limits that make no sense."""
