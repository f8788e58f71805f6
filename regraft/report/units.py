"""Numbers as people read them."""

from __future__ import annotations

import math


def seconds(value: float | None) -> str:
    """A time with three digits and its unit; a dash for None."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{_three_digits(value / 1e-9)} ns" if value else "0 s"


def drift(value: float | None) -> str:
    """A relative error in scientific form; a dash for None."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    return "0" if value == 0 else f"{value:.1e}"


def count(value: float, unit: str = "") -> str:
    """A large number with its prefix: ``count(2.5e9, "FLOP")`` is "2.50 GFLOP"."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{_three_digits(value / size)} {prefix}{unit}"
    return f"{_three_digits(value)} {unit}".strip()


def ratio(before: float, after: float) -> str:
    """How many times shorter ``after`` is; empty when either is nothing."""
    return f"{before / after:.2f}x" if before > 0 and after > 0 else ""


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}"
