"""The Pareto plot of an accuracy budget as SVG: loss against time, what was predicted and what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from regraft.report import units
from regraft.report.budget import BudgetPoint, BudgetReport
from regraft.report.svg import line, text

_WIDTH, _HEIGHT = 760, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 20, 20, 52
_DECADES = 6  # of loss that are shown; what loses less stands at the left edge
_FAR = 1e3  # a limit that is more than this times the largest loss stands at the right edge
_RADIUS = 4.5


@dataclass(frozen=True)
class _Plane:
    """Loss, logarithmic between two powers of ten, and time, linear from nothing, to pixels."""

    low: int
    high: int
    slowest: float

    def x(self, loss: float) -> float:
        share = (math.log10(max(loss, 10.0**self.low)) - self.low) / (self.high - self.low)
        return _LEFT + min(share, 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, seconds: float) -> float:
        return _HEIGHT - _BOTTOM - seconds / self.slowest * (_HEIGHT - _TOP - _BOTTOM)


def curve_svg(budget: BudgetReport) -> Markup | None:
    """The plot, or None when fewer than two points are known, or none loses anything."""
    points = [point for point in budget.points if math.isfinite(point.known_loss)]
    if len(points) < 2 or not any(point.known_loss > 0 for point in points):
        return None
    worst = max(point.known_loss for point in points)
    high = math.ceil(math.log10(max(worst, min(budget.limit, _FAR * worst))) + 0.05)
    plane = _Plane(high - _DECADES, high, 1.08 * max(point.known_seconds for point in points))
    limit = plane.x(budget.limit)
    parts = [*_grid(plane), line("roof", limit, _TOP, limit, _HEIGHT - _BOTTOM)]
    parts.append(text("note", limit - 6, _TOP + 10, "end", f"limit {budget.limit:g}"))
    for kind in ("predicted", "tried"):
        own = [point for point in budget.curve if point.kind in (kind, "exact") and point in points]
        path = " ".join(f"{plane.x(point.known_loss):.1f},{plane.y(point.known_seconds):.1f}" for point in own)
        parts.append(Markup('<polyline class="front {}" points="{}"/>').format(_style(kind), path))
    parts += [_mark(point, plane) for point in points]
    head = Markup('<svg class="roofline" viewBox="0 0 {} {}" role="img" aria-label="Loss and time">').format(
        _WIDTH, _HEIGHT
    )
    return head + Markup("").join(parts) + Markup("</svg>")


def _style(kind: str) -> str:
    """The colours that time before and after has elsewhere in the report."""
    return "before" if kind == "predicted" else "after"


def _grid(plane: _Plane) -> Iterator[Markup]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for exponent in range(plane.low, plane.high + 1):
        at = plane.x(10.0**exponent)
        yield line("grid", at, _TOP, at, bottom)
        yield text("tick", at, bottom + 18, "middle", f"{'≤ ' * (exponent == plane.low)}1e{exponent}")
    for quarter in range(5):
        at = plane.y(plane.slowest * quarter / 4)
        yield line("grid", _LEFT, at, right, at)
        yield text("tick", _LEFT - 8, at + 4, "end", units.seconds(plane.slowest * quarter / 4))
    yield text("axis", (_LEFT + right) / 2, _HEIGHT - 10, "middle", "loss")
    turned = Markup('<text class="axis" text-anchor="middle" transform="translate(16 {:.1f}) rotate(-90)">{}</text>')
    yield turned.format((_TOP + bottom) / 2, "time of a call")


def _mark(point: BudgetPoint, plane: _Plane) -> Markup:
    told = f"{point.name}: loss {units.drift(point.known_loss)}, {units.seconds(point.known_seconds)}"
    shape = Markup('<circle class="point {}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>')
    radius = 2 * _RADIUS if point.chosen else _RADIUS
    return shape.format(_style(point.kind), plane.x(point.known_loss), plane.y(point.known_seconds), radius, told)
