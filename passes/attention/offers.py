"""What lossy attention offers to an accuracy budget: candidates by site, each with its knob at one value.

The functions are ``Offer``s (``passes/budget/candidate.py``); what heads do is seen on the inputs that the program was
captured with.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from regraft.ir.nodes import arguments, shape, user_line
from regraft.ir.program import Program
from regraft.passes.attention.drop_heads import DropHeads
from regraft.passes.attention.lossy import attentions
from regraft.passes.attention.profile import profile_heads
from regraft.passes.attention.restrict import RestrictHeads
from regraft.passes.attention.specialise import LOCAL, STREAMING, NarrowHeads, kinds_of, whole_groups
from regraft.passes.attention.tidal import TidalDecode
from regraft.passes.budget.candidate import Candidate, NotOffered

_SINKS = 4
_SMALLEST_WINDOW = 64
_DORMANT = (0.1, 0.25, 0.5)  # of the layer's mean output
_COVERAGE = (0.99, 0.95, 0.9)  # of a head's weight that a narrower view holds
_DENSE_LAYERS = 2  # in front of the one that chooses the keys of a decode step
_FEWEST_KEYS = 32
_NO_ATTENTION = "no attention was recognised"


def offer_windows(program: Program, target: str) -> Iterator[Candidate | NotOffered]:
    """Sinks and a window of half, a quarter and an eighth of the keys, for each attention that is long enough."""
    refused = _too_short(program, "windows", 2 * _SMALLEST_WINDOW)
    if refused is not None:
        yield refused
        return
    for place, site in enumerate(attentions(program)):
        keys = _keys(site)
        for part in (2, 4, 8):
            window = keys // part
            if window >= _SMALLEST_WINDOW:
                yield Candidate(
                    site=f"attention {place}",
                    knob=f"{_SINKS} sinks, a window of {window}",
                    rewrite=RestrictHeads(place, window, _SINKS),
                    family="windows",
                    user_line=user_line(site),
                )


def offer_dormant_heads(program: Program, target: str) -> Iterator[Candidate | NotOffered]:
    """Heads whose outputs are small beside those of their layer, dropped with their projections."""
    sites, offered = attentions(program), False
    if not sites:
        yield NotOffered("dormant heads", _NO_ATTENTION)
        return
    for place, (site, profile) in enumerate(zip(sites, profile_heads(program, 1, 0), strict=True)):
        groups = shape(site)[1] // shape(arguments(site)["key"])[1]
        before: tuple[int, ...] = ()
        for limit in _DORMANT:
            gone = whole_groups([head for head, norm in enumerate(profile.norm) if norm < limit], groups)
            if gone != before and len(gone) < len(profile.norm):
                offered = True
                yield Candidate(
                    site=f"attention {place}",
                    knob=f"{len(gone)} of {len(profile.norm)} heads dropped",
                    rewrite=DropHeads(place, gone),
                    family="dormant heads",
                    user_line=user_line(site),
                )
            before = gone
    if not offered:
        yield NotOffered(
            "dormant heads", f"every head says more than {max(_DORMANT)} of what its layer's do in the mean"
        )


def offer_specialised_heads(program: Program, target: str) -> Iterator[Candidate | NotOffered]:
    """Of each attention, the heads whose weight lies on a window, or on it and the sinks, given that view."""
    family, offered = "head specialisation", False
    refused = _too_short(program, family, 8 * _SMALLEST_WINDOW)
    if refused is not None:
        yield refused
        return
    sites = attentions(program)
    window = max(map(_keys, sites)) // 8
    for place, (site, profile) in enumerate(zip(sites, profile_heads(program, window, _SINKS), strict=True)):
        before: list[str] = []
        for coverage in _COVERAGE:
            kinds = kinds_of(profile, coverage, 0.0)
            local, streaming = (
                tuple(head for head, kind in enumerate(kinds) if kind == wanted) for wanted in (LOCAL, STREAMING)
            )
            if (local or streaming) and kinds != before:
                offered = True
                yield Candidate(
                    site=f"attention {place}",
                    knob=f"{len(local)} local and {len(streaming)} streaming of {len(kinds)} heads, window {window}",
                    rewrite=NarrowHeads(place, window, _SINKS, local, streaming),
                    family=family,
                    user_line=user_line(site),
                )
            before = kinds
    if not offered:
        yield NotOffered(
            family, f"no head has {min(_COVERAGE):.0%} of its weight on a window of {window} and the sinks"
        )


def offer_decode_sparsity(program: Program, target: str) -> Iterator[Candidate | NotOffered]:
    """On a decode step (one query a sequence), a half, a quarter or an eighth of the keys, chosen in one layer for
    those behind it, and anew in the middle of a deep model."""
    family, sites = "decode sparsity", attentions(program)
    refused = _too_short(program, family, 2 * _FEWEST_KEYS)
    if refused is None and any(shape(arguments(site)["query"])[2] != 1 for site in sites):
        refused = NotOffered(family, "the model is no decode step: its attentions have more than one query a sequence")
    if refused is None and len(sites) < _DENSE_LAYERS + 2:
        refused = NotOffered(family, f"the model has {len(sites)} attentions, and this begins at {_DENSE_LAYERS + 2}")
    if refused is not None:
        yield refused
        return
    keys = max(map(_keys, sites))
    again = len(sites) // 2 if len(sites) > 2 * (_DENSE_LAYERS + 2) else None
    for part in (2, 4, 8):
        if keys // part >= _FEWEST_KEYS:
            yield Candidate(
                site="decode step",
                knob=f"{keys // part} of {keys} keys, chosen in layer {_DENSE_LAYERS}"
                + (f" and {again}" if again is not None else ""),
                rewrite=TidalDecode(keys // part, _DENSE_LAYERS, again),
                family=family,
                user_line=user_line(sites[_DENSE_LAYERS]),
                excludes=frozenset(f"attention {place}" for place in range(len(sites))),
            )


def _keys(site: fx.Node) -> int:
    """How many keys an attention has; 0 where that is a symbol."""
    keys = shape(arguments(site)["key"])[2]
    return keys if isinstance(keys, int) else 0


def _too_short(program: Program, family: str, fewest: int) -> NotOffered | None:
    """Why no attention has as many keys; None where one does."""
    sites = attentions(program)
    if not sites:
        return NotOffered(family, _NO_ATTENTION)
    most = max(map(_keys, sites))
    if most == 0:
        return NotOffered(family, "the numbers of keys are symbols; compile for fixed sizes")
    if most < fewest:
        return NotOffered(family, f"the attentions have at most {most} keys, and this begins at {fewest}")
    return None
