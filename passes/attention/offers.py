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
from regraft.passes.attention.specialise import LOCAL, STREAMING, NarrowHeads, kinds_of, whole_groups
from regraft.passes.attention.tidal import TidalDecode
from regraft.passes.budget.candidate import Candidate

_SINKS = 4
_SMALLEST_WINDOW = 64
_DORMANT = (0.1, 0.25, 0.5)  # of the layer's mean output
_COVERAGE = (0.99, 0.95, 0.9)  # of a head's weight that a narrower view holds
_DENSE_LAYERS = 2  # in front of the one that chooses the keys of a decode step
_FEWEST_KEYS = 32


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


def offer_specialised_heads(program: Program, target: str) -> Iterator[Candidate]:
    """Of each attention, the heads whose weight lies on a window, or on it and the sinks, given that view."""
    sites = attentions(program)
    keys = max((size for site in sites if isinstance(size := shape(arguments(site)["key"])[2], int)), default=0)
    window = keys // 8
    if window < _SMALLEST_WINDOW:
        return
    for place, (site, profile) in enumerate(zip(sites, profile_heads(program, window, _SINKS), strict=True)):
        before: list[str] = []
        for coverage in _COVERAGE:
            kinds = kinds_of(profile, coverage, 0.0)
            local, streaming = (
                tuple(head for head, kind in enumerate(kinds) if kind == wanted) for wanted in (LOCAL, STREAMING)
            )
            if (local or streaming) and kinds != before:
                yield Candidate(
                    site=f"attention {place}",
                    knob=f"{len(local)} local and {len(streaming)} streaming of {len(kinds)} heads, window {window}",
                    rewrite=NarrowHeads(place, window, _SINKS, local, streaming),
                    family="head specialisation",
                    user_line=user_line(site),
                )
            before = kinds


def offer_decode_sparsity(program: Program, target: str) -> Iterator[Candidate]:
    """On a decode step (one query a sequence), a half, a quarter or an eighth of the keys, chosen in one layer for
    those behind it, and anew in the middle of a deep model."""
    sites = attentions(program)
    sizes = [(shape(arguments(site)["query"])[2], shape(arguments(site)["key"])[2]) for site in sites]
    keys = max((keys for _, keys in sizes if isinstance(keys, int)), default=0)
    if len(sites) < _DENSE_LAYERS + 2 or any(length != 1 for length, _ in sizes):
        return
    again = len(sites) // 2 if len(sites) > 2 * (_DENSE_LAYERS + 2) else None
    for part in (2, 4, 8):
        if keys // part >= _FEWEST_KEYS:
            yield Candidate(
                site="decode step",
                knob=f"{keys // part} of {keys} keys, chosen in layer {_DENSE_LAYERS}"
                + (f" and {again}" if again is not None else ""),
                rewrite=TidalDecode(keys // part, _DENSE_LAYERS, again),
                family="decode sparsity",
                user_line=user_line(sites[_DENSE_LAYERS]),
                excludes=frozenset(f"attention {place}" for place in range(len(sites))),
            )
