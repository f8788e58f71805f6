"""Heads that see less: the first keys and a window of recent ones, or the window alone.

For all heads that is StreamingLLM's mask (Xiao et al., arXiv:2309.17453), for some of them the streaming heads of
DuoAttention (arXiv:2410.10819). Only the mask changes: positions stay as they are, and what a cache keeps is the
serving engine's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.mask import (
    And,
    Everything,
    Or,
    Predicate,
    band,
    heads,
    is_causal,
    parse,
    prefix,
    proof_lengths,
    simplify,
)
from regraft.ir.nodes import arguments, shape, size_equal
from regraft.ir.program import Program
from regraft.passes.attention.errors import AttentionError
from regraft.passes.attention.lossy import attention_at, builder, log_fired, log_refused, take_place
from regraft.passes.base import Pass
from regraft.passes.refused import Refused


@dataclass(frozen=True)
class RestrictHeads(Pass):
    """Some heads of the attention at ``place`` see the first ``sinks`` keys and those nearer than ``window`` alone, of
    those that they saw before. ``heads``: which of them; None is all. Where keys are more than queries, the last query
    is at the last key. A window that hides nothing changes nothing."""

    place: int
    window: int
    sinks: int = 0
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise AttentionError(
                f"window={self.window} and sinks={self.sinks} were given; a row sees its own key at least: "
                "give a window of 1 or more and 0 sinks or more"
            )

    def run(self, program: Program, session: Session) -> int:
        site = attention_at(program, self.place)
        count = shape(site)[1]
        chosen = sorted(set(range(count) if self.heads is None else self.heads))
        if any(not 0 <= head < count for head in chosen):
            raise AttentionError(f"heads {chosen} were given; attention {self.place} has {count}, numbered from 0")
        if session.fuel.empty or not chosen:
            return 0
        try:
            text = self._mask(site, chosen)
        except Refused as refused:
            log_refused(session, self, site, refused)
            return 0
        if text == arguments(site)["mask"]:
            return 0
        build = builder(program, site, site, self.name)
        new = build.call(ops.attention, *site.args, **{**site.kwargs, "mask": text})
        take_place(program, site, new)
        which = "all heads" if len(chosen) == count else f"heads {', '.join(map(str, chosen))}"
        log_fired(session, self, new, f"{which}: {self.sinks} sinks, a window of {self.window}")
        return 1

    def _mask(self, site: fx.Node, chosen: list[int]) -> str:
        given = arguments(site)
        fill = given["mask_fill"]
        if fill is not None and fill > -1e4:
            raise Refused(f"masked scores are {fill:g}, and take weight", site)
        before = parse(given["mask"])
        length, keys = shape(given["query"])[2], shape(given["key"])[2]
        shift = 0 if size_equal(length, keys) else "key_len - query_len"
        low = f"{shift} - {self.window - 1}" if shift else str(1 - self.window)
        high = None if is_causal(before) else f"{shift} + {self.window - 1}" if shift else str(self.window - 1)
        near: Predicate = band(low, high)
        if self.sinks:
            near = Or((prefix(self.sinks), near))
        others = tuple(heads(first, last) for first, last in _runs(set(range(shape(site)[1])) - set(chosen)))
        mask = And((before, Or((near, *others)) if others else near))
        plain = simplify(mask, *proof_lengths(length, keys))
        return "all" if isinstance(plain, Everything) else str(plain)


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as half-open intervals."""
    ordered = sorted(numbers)
    start = 0
    for place in range(1, len(ordered) + 1):
        if place == len(ordered) or ordered[place] != ordered[place - 1] + 1:
            yield ordered[start], ordered[place - 1] + 1
            start = place
