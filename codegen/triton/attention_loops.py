"""The loops of an attention kernel over tiles of keys, as text.

A union of intervals is at most three ranges of tiles, each with tiles at both ends that some rows see in part and
tiles between them that all rows see whole. All partial tiles are one loop, all whole ones another: a counter runs over
the ranges one after the other, so that there are two copies of the inner code however many intervals there are.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What ``tile_bounds`` of a term gives.
BOUNDS = ("begin", "whole", "whole_finish", "finish")


@dataclass(frozen=True)
class Loop:
    """A loop over tiles: lines that count them, the name of their number, lines that find the tile of an index."""

    comment: str
    counts: tuple[str, ...]
    total: str
    picks: tuple[str, ...]
    masked: bool


def ordering_lines(terms: int) -> list[str]:
    """Statements that put the ranges of several intervals in order and take from each what an earlier one covers."""
    lines: list[str] = []
    if terms == 1:
        return lines
    lines.append("# In order of their first tile; what an earlier range covers is taken from a later one.")
    pairs = [(0, 1)] if terms == 2 else [(0, 1), (1, 2), (0, 1)]
    for left, right in pairs:
        names = [f"{bound}_{place}" for place in (left, right) for bound in BOUNDS]
        lines += [
            f"{', '.join(names)} = exchange(",
            f"    {', '.join(names)}",
            ")",
        ]
    for place in range(1, terms):
        lines += [f"{bound}_{place} = tl.maximum({bound}_{place}, finish_{place - 1})" for bound in BOUNDS]
    return lines


def loops(terms: int, whole_tiles: bool) -> list[Loop]:
    """The loops for a number of intervals; ``whole_tiles``: a tile inside an interval needs no predicate."""
    places = range(terms)
    if not whole_tiles:
        ranges = [(f"begin_{place}", f"finish_{place}") for place in places]
        return [_loop("Tiles that some row sees.", "tiles_seen", ranges, masked=True)]
    partial = [
        bounds
        for place in places
        for bounds in ((f"begin_{place}", f"whole_{place}"), (f"whole_finish_{place}", f"finish_{place}"))
    ]
    whole = [(f"whole_{place}", f"whole_finish_{place}") for place in places]
    return [
        _loop("Tiles that every row sees whole.", "whole_tiles", whole, masked=False),
        _loop("Tiles that some row sees in part.", "partial_tiles", partial, masked=True),
    ]


def _loop(comment: str, total: str, ranges: list[tuple[str, str]], masked: bool) -> Loop:
    names = [f"{total}_{number}" for number in range(len(ranges) - 1)] + [total]
    counts, picks = [], []
    before = ""
    for number, ((begin, finish), name) in enumerate(zip(ranges, names, strict=True)):
        counts.append(f"{name} = {before}{finish} - {begin}")
        if number == 0:
            picks.append(f"tile = {begin} + index")
        else:
            last = names[number - 1]
            picks.append(f"tile = tl.where(index < {last}, tile, {begin} + index - {last})")
        before = f"{name} + "
    return Loop(comment, tuple(counts), total, tuple(picks), masked)
