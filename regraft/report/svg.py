"""The strokes that plots are made of."""

from __future__ import annotations

from markupsafe import Markup


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    """A line of the class ``kind``."""
    shape = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    return shape.format(kind, x1, y1, x2, y2)


def text(kind: str, x: float, y: float, anchor: str, said: str) -> Markup:
    """Text of the class ``kind``; ``anchor`` is "start", "middle" or "end"."""
    shape = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return shape.format(kind, x, y, anchor, said)
