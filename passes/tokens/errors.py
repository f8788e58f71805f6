"""What is wrong with a request to reduce tokens."""

from __future__ import annotations

from regraft.ir.errors import RegraftError


class ReductionError(RegraftError, ValueError):
    """A schedule or a method that does not fit the program."""
