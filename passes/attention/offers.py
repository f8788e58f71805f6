"""What lossy attention offers to an accuracy budget: candidates by site, each with its knob at one value.

The functions are ``Offer``s (``passes/budget/candidate.py``); what heads do is seen on the inputs that the program was
captured with.
"""

from __future__ import annotations

from collections.abc import Iterator

from regraft.ir.nodes import arguments, shape, user_line
from regraft.ir.program import Program
from regraft.passes.attention.drop_heads import DropHeads
from regraft.passes.attention.lossy import attentions
from regraft.passes.attention.profile import profile_heads
from regraft.passes.attention.restrict import RestrictHeads
from regraft.passes.attention.specialise import whole_groups
from regraft.passes.budget.candidate import Candidate

_SINKS = 4
_SMALLEST_WINDOW = 64
_DORMANT = (0.1, 0.25, 0.5)  # of the layer's mean output


def offer_windows(program: Program, target: str) -> Iterator[Candidate]:
    """Sinks and a window of half, a quarter and an eighth of the keys, for each attention that is long enough."""
    for place, site in enumerate(attentions(program)):
        keys = shape(arguments(site)["key"])[2]
        for part in (2, 4, 8):
            window = keys // part if isinstance(keys, int) else 0
            if window >= _SMALLEST_WINDOW:
                yield Candidate(
                    site=f"attention {place}",
                    knob=f"{_SINKS} sinks, a window of {window}",
                    rewrite=RestrictHeads(place, window, _SINKS),
                    family="windows",
                    user_line=user_line(site),
                )


def offer_dormant_heads(program: Program, target: str) -> Iterator[Candidate]:
    """Heads whose outputs are small beside those of their layer, dropped with their projections."""
    sites = attentions(program)
    if not sites:
        return
    for place, (site, profile) in enumerate(zip(sites, profile_heads(program, 1, 0), strict=True)):
        groups = shape(site)[1] // shape(arguments(site)["key"])[1]
        before: tuple[int, ...] = ()
        for limit in _DORMANT:
            gone = whole_groups([head for head, norm in enumerate(profile.norm) if norm < limit], groups)
            if gone != before and len(gone) < len(profile.norm):
                yield Candidate(
                    site=f"attention {place}",
                    knob=f"{len(gone)} of {len(profile.norm)} heads dropped",
                    rewrite=DropHeads(place, gone),
                    family="dormant heads",
                    user_line=user_line(site),
                )
            before = gone
