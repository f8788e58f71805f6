"""Points in the plane of loss and time, and those among them that no other one beats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar


class Point(Protocol):
    """Something that costs accuracy and takes time; less is better in both."""

    @property
    def loss(self) -> float:
        """What it loses, by whatever metric."""
        ...

    @property
    def seconds(self) -> float:
        """How long it takes."""
        ...


AnyPoint = TypeVar("AnyPoint", bound=Point)


def front(points: Iterable[AnyPoint]) -> list[AnyPoint]:
    """The Pareto front: points that none beats, by rising loss and falling time. Of equal ones the first is kept;
    points that are not numbers are left out."""
    best: list[AnyPoint] = []
    numbers = (point for point in points if point.loss == point.loss and point.seconds == point.seconds)
    for point in sorted(numbers, key=lambda point: (point.loss, point.seconds)):
        if not best or point.seconds < best[-1].seconds:
            best.append(point)
    return best


def fastest(points: Sequence[AnyPoint], limit: float) -> AnyPoint | None:
    """The fastest point whose loss is at most ``limit``; of equally fast ones that with the least loss."""
    fitting = [point for point in points if point.loss <= limit]
    return min(fitting, key=lambda point: (point.seconds, point.loss), default=None)
