"""Heads specialised from calibration: global, local, streaming or dormant, each head by what it was seen to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from regraft.ir.driver import Session
from regraft.ir.nodes import arguments, shape
from regraft.ir.program import Program
from regraft.passes.attention.drop_heads import DropHeads
from regraft.passes.attention.errors import AttentionError
from regraft.passes.attention.lossy import attentions
from regraft.passes.attention.profile import HeadProfile, profile_heads
from regraft.passes.attention.restrict import RestrictHeads
from regraft.passes.base import Pass

GLOBAL, LOCAL, STREAMING, DORMANT = "global", "local", "streaming", "dormant"


def kinds_of(profile: HeadProfile, coverage: float, dormant: float) -> list[str]:
    """The kind of each head: dormant below ``dormant`` of its layer's mean output, local where the window holds
    ``coverage`` of its weight, streaming where window and sinks together do, else global."""
    kinds = []
    for norm, near, sunk in zip(profile.norm, profile.near, profile.sunk, strict=True):
        if norm < dormant:
            kinds.append(DORMANT)
        elif near >= coverage:
            kinds.append(LOCAL)
        else:
            kinds.append(STREAMING if near + sunk >= coverage else GLOBAL)
    return kinds


@dataclass(frozen=True)
class NarrowHeads(Pass):
    """Heads ``local`` of the attention at ``place`` see a window alone, heads ``streaming`` the sinks, too."""

    place: int
    window: int
    sinks: int
    local: tuple[int, ...]
    streaming: tuple[int, ...]

    def run(self, program: Program, session: Session) -> int:
        views = ((self.local, 0), (self.streaming, self.sinks))
        return sum(
            RestrictHeads(self.place, self.window, sinks, chosen).run(program, session)
            for chosen, sinks in views
            if chosen
        )


@dataclass(frozen=True)
class SpecialiseHeads(Pass):
    """Every attention's heads by their kinds, as its inputs at capture show them. ``coverage``: the share of a head's
    weight that a narrower view must hold, 1 for none but what hides nothing; ``dormant``: as of ``kinds_of``, 0 to drop
    no head. Local and streaming heads are masked, dormant ones dropped with their projections."""

    window: int
    sinks: int = 4
    coverage: float = 0.95
    dormant: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.coverage <= 1 or not 0 <= self.dormant < 1:
            raise AttentionError(
                f"coverage={self.coverage} and dormant={self.dormant} were given; give shares: coverage above 0 and up "
                "to 1, dormant from 0 to below 1"
            )

    def run(self, program: Program, session: Session) -> int:
        return sum(item.run(program, session) for item in list(self.rewrites(program)))

    def rewrites(self, program: Program) -> Iterator[Pass]:
        """The passes that make it so, one or more an attention."""
        profiles = profile_heads(program, self.window, self.sinks)
        for place, (site, profile) in enumerate(zip(attentions(program), profiles, strict=True)):
            kinds = kinds_of(profile, self.coverage, self.dormant)
            groups = shape(site)[1] // shape(arguments(site)["key"])[1]
            gone = whole_groups([head for head, kind in enumerate(kinds) if kind == DORMANT], groups)
            if len(gone) == len(kinds):
                gone = gone[groups:]  # one group at least stays
            if gone:
                yield DropHeads(place, gone)
            kept = [kind for head, kind in enumerate(kinds) if head not in gone]
            local, streaming = (
                tuple(head for head, found in enumerate(kept) if found == kind) for kind in (LOCAL, STREAMING)
            )
            if local or streaming:
                yield NarrowHeads(place, self.window, self.sinks, local, streaming)


def whole_groups(heads: list[int], groups: int) -> tuple[int, ...]:
    """Those heads all of whose group, which shares a key, is among them."""
    chosen = set(heads)
    return tuple(
        head for head in heads if set(range(head // groups * groups, (head // groups + 1) * groups)) <= chosen
    )  # fmt: skip
