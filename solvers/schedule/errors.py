"""What is wrong with a problem, said in one sentence: what was given, what was expected, what to do."""

from __future__ import annotations


class ScheduleError(ValueError):
    """Tables or options that no choice can be made from."""
