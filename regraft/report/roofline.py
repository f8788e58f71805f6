"""The roofline plot as SVG: operations a byte against operations a second, both logarithmic.

Each operator is a point before and after; its area grows with its share of the time. A point that was not
measured lies on the roof, where the cost model puts it. Williams, Waterman and Patterson, "Roofline", 2009.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from markupsafe import Markup

from regraft.report import units
from regraft.report.model import OperatorRow, Report
from regraft.report.svg import line, text

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 20, 34, 52
_RADIUS = (3.5, 15.0)


@dataclass(frozen=True)
class Point:
    """Calls of one operator with the same work: how intense, how fast, how long together."""

    operator: str
    series: str
    calls: int
    intensity: float
    rate: float
    seconds: float


@dataclass(frozen=True)
class _Scale:
    """Maps decades of a value to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        """Powers of ten inside the range."""
        for exponent in range(math.ceil(self.low), math.floor(self.high) + 1):
            yield 10.0**exponent


def points(rows: Iterable[OperatorRow], series: str) -> list[Point]:
    """Rows that compute and take time, joined where operator and work are the same; largest first."""
    groups: dict[tuple[str, float, float], list[float]] = {}
    for row in rows:
        spent = row.predicted_seconds if row.measured_seconds is None else row.measured_seconds
        if row.flops > 0 and row.bytes > 0 and spent > 0:
            groups.setdefault((row.operator, row.flops, row.bytes), []).append(spent)
    made = [
        Point(name, series, len(times), flops / moved, flops * len(times) / sum(times), sum(times))
        for (name, flops, moved), times in groups.items()
    ]
    return sorted(made, key=lambda point: -point.seconds)


def roofline_svg(report: Report) -> Markup | None:
    """The plot, or None when no operator computes or the device's rates are not known."""
    peak, bandwidth = report.environment.peak_flops, report.environment.bytes_per_second
    before, after = points(report.operators_before, "before"), points(report.operators_after, "after")
    if not (before or after) or peak <= 0 or bandwidth <= 0:
        return None
    everything = sorted([*before, *after], key=lambda point: -point.seconds)  # small points above large ones
    x, y = _scales(everything, peak, bandwidth)
    most = everything[0].seconds
    parts = [*_grid(x, y), *_roof(x, y, peak, bandwidth), *(_mark(point, x, y, most) for point in everything)]
    head = Markup('<svg class="roofline" viewBox="0 0 {} {}" role="img" aria-label="Roofline plot">').format(
        _WIDTH, _HEIGHT
    )
    return head + Markup("").join(parts) + Markup("</svg>")


def _scales(plotted: list[Point], peak: float, bandwidth: float) -> tuple[_Scale, _Scale]:
    ridge = peak / bandwidth
    intensities = [point.intensity for point in plotted] + [ridge]
    rates = [point.rate for point in plotted] + [peak]
    x_low, x_high = math.log10(min(intensities)) - 0.4, math.log10(max(intensities)) + 0.6
    y_low, y_high = math.log10(min(rates)) - 0.4, math.log10(max(rates)) + 0.3
    return _Scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT), _Scale(y_low, y_high, _HEIGHT - _BOTTOM, _TOP)


def _grid(x: _Scale, y: _Scale) -> Iterator[Markup]:
    for tick in x.ticks():
        yield line("grid", x(tick), _TOP, x(tick), _HEIGHT - _BOTTOM)
        yield text("tick", x(tick), _HEIGHT - _BOTTOM + 18, "middle", f"{tick:g}")
    for tick in y.ticks():
        yield line("grid", _LEFT, y(tick), _WIDTH - _RIGHT, y(tick))
        yield text("tick", _LEFT - 8, y(tick) + 4, "end", units.count(tick).replace(".00", "").replace(".0", ""))
    yield text("axis", (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, "middle", "operations per byte")
    turned = Markup('<text class="axis" text-anchor="middle" transform="translate(16 {:.1f}) rotate(-90)">{}</text>')
    yield turned.format((_TOP + _HEIGHT - _BOTTOM) / 2, "operations per second")


def _roof(x: _Scale, y: _Scale, peak: float, bandwidth: float) -> Iterator[Markup]:
    ridge = peak / bandwidth
    lowest = max(10.0**x.low, 10.0**y.low / bandwidth)
    yield line("roof", x(lowest), y(lowest * bandwidth), x(ridge), y(peak))
    yield line("roof", x(ridge), y(peak), _WIDTH - _RIGHT, y(peak))
    yield text("note", _WIDTH - _RIGHT, y(peak) - _RADIUS[1] - 4, "end", f"peak {units.count(peak, 'FLOP/s')}")
    label = Markup('<text class="note" transform="translate({:.1f} {:.1f}) rotate({:.1f})">{}</text>')
    end = (x(ridge), y(peak))
    start = (x(lowest), y(lowest * bandwidth))
    angle = math.degrees(math.atan2(end[1] - start[1], end[0] - start[0]))
    place = (start[0] + 0.45 * (end[0] - start[0]) - 6, start[1] + 0.45 * (end[1] - start[1]) - 8)
    yield label.format(*place, angle, f"memory {units.count(bandwidth, 'B/s')}")


def _mark(point: Point, x: _Scale, y: _Scale, most: float) -> Markup:
    small, large = _RADIUS
    radius = small + (large - small) * math.sqrt(point.seconds / most)
    told = (
        f"{point.operator}, {point.series}: {point.calls} calls, {units.seconds(point.seconds)} together, "
        f"{point.intensity:.3g} operations per byte, {units.count(point.rate, 'FLOP/s')}"
    )
    shape = Markup('<circle class="point {}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>')
    return shape.format(point.series, x(point.intensity), y(point.rate), radius, told)
