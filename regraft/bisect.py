"""Which rewrite broke the model: binary search over the number of rule applications that are allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """The step from within to out of tolerance. ``number`` is the first bad application (1 is the first of
    all), or 0 when nothing was applied and it is bad already."""

    number: int
    error_before: float
    error_after: float


def first_bad(error_of: Callable[[int], float], total: int, tolerance: float) -> Turn | None:
    """The first number of applications in ``0 … total`` at which ``error_of`` exceeds ``tolerance``.

    ``error_of(n)`` is the error with the first ``n`` applications made; NaN counts as out of tolerance. Takes
    ``log2(total)`` evaluations. None when all of them together are within. Where the error goes in and out
    more than once, the result is one such step out, with an application that is within just before it.
    """
    errors: dict[int, float] = {}

    def bad(number: int) -> bool:
        if number not in errors:
            errors[number] = error_of(number)
        return not errors[number] <= tolerance

    if not bad(total):
        return None
    if bad(0):
        return Turn(0, math.nan, errors[0])
    low, high = 0, total
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bad(middle) else (middle, high)
    return Turn(high, errors[low], errors[high])
