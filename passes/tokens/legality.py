"""Whether tokens may be reduced in a program, where, and what that obliges to.

``examine`` walks along the token axis from a self-attention to the outputs. It knows nothing of models: what it cannot
follow is a barrier, in front of which every token is put back, or, where a method drops tokens, a refusal. Attentions
behind a barrier, or over other tokens, begin walks of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import fx

from regraft.ir.mask import Band, Bits, Dense, Keys, Length, Lengths, Predicate, Same
from regraft.ir.nodes import arguments, shape, size_equal, user_line
from regraft.ir.probe import Pool, Probe
from regraft.ir.program import Program
from regraft.passes.refused import Refused
from regraft.passes.tokens.layout import Batch, Span, is_plain, plain, span_dim, span_of
from regraft.passes.tokens.padding import Told, conjuncts, is_of_keys, told_of_keys
from regraft.passes.tokens.sites import Site, attentions, constant_ends, find_site, projected
from regraft.passes.tokens.step import Duty, Kind, Step
from regraft.passes.tokens.walk import Walk

#: A score so far below the others has no weight, in fp64 either.
HIDDEN = -50.0


@dataclass(frozen=True)
class Obligation:
    """Something that a reduction obliges to: the node, its class, what is done about it, and the user's line."""

    node: str
    kind: Kind
    duty: Duty
    user_line: str
    reason: str = ""


@dataclass
class Legality:
    """What ``examine`` found. ``attentions`` are all self-attentions in order; ``sites`` those behind which tokens may
    go, ``refused`` why they may not go behind the others. ``reached`` are those that the walk says all about: the
    others begin walks of their own. ``prefix`` and ``suffix`` tokens must stay."""

    attentions: list[fx.Node]
    walk: Walk | None = None
    sites: dict[fx.Node, Site] = field(default_factory=dict)
    refused: dict[fx.Node, Refused] = field(default_factory=dict)
    reached: set[fx.Node] = field(default_factory=set)
    prefix: int = 0
    suffix: int = 0

    def steps(self, site: Site) -> Iterator[tuple[fx.Node, Step]]:
        """The nodes that a reduction at ``site`` reaches, in order."""
        assert self.walk is not None
        reached = {site.anchor}
        for node, step in self.walk.steps.items():
            if any(source in reached for source in node.all_input_nodes):
                if step.layout is not None:
                    reached.add(node)
                yield node, step

    def obligations(self, site: Site) -> list[Obligation]:
        """All but the nodes that are written as they were."""
        plainly = (Duty.SAME, Duty.RESIZE)
        return [
            Obligation(node.name, step.kind, step.duty, user_line(node), step.reason)
            for node, step in self.steps(site)
            if step.duty not in plainly or step.kind is not Kind.EQUIVARIANT
        ]


def examine(program: Program, protect: int = 0, drops: bool = False, protect_end: int = 0, start: int = 0) -> Legality:
    """Find where tokens of a recognised program may be reduced.

    ``protect`` tokens in front and ``protect_end`` at the end stay whatever the graph says; ``drops``: the method
    cannot put tokens back. The tokens are those of the self-attention number ``start``.
    """
    found = Legality(attentions(program))
    if start >= len(found.attentions):
        return found
    first = found.attentions[start]
    found.reached.add(first)
    if not isinstance(shape(first)[2], int):
        symbolic = Refused("the number of tokens is a symbol; capture with a fixed length", first)
        return replace(found, refused=dict.fromkeys(found.attentions, symbolic))
    found.walk = _walk(program, first)
    found.reached |= {node for node in found.attentions if node in found.walk.layouts}
    source = projected(arguments(first)["query"])
    behind = _Behind(program, found.walk)
    for node in found.attentions:
        try:
            if source is not None and program.is_made_of_weights(source):
                raise Refused("the tokens come from weights, as the queries of a detector do", first)
            check_mask(program, node)
            site = _site(found, node, drops)
            behind.check(site, found.steps(site))
            found.sites[node] = site
        except Refused as refused:
            found.refused[node] = refused
    _protect(program, found, protect, protect_end)
    return found


def walks(program: Program, protect: int = 0, drops: bool = False, protect_end: int = 0) -> Iterator[Legality]:
    """``examine`` from every self-attention that no walk before has reached. The program may be rewritten in between,
    as long as it keeps its self-attentions and their order."""
    left = [*range(len(attentions(program)))]
    while left:
        found = examine(program, protect, drops, protect_end, left[0])
        reached = {number for number, node in enumerate(found.attentions) if node in found.reached}
        left = [number for number in left if number not in reached]
        yield found


def _walk(program: Program, start: fx.Node) -> Walk:
    """The walk from ``start``, whose result is ``[batch, heads, tokens, head_dim]``."""
    batch, heads, tokens, width = shape(start)
    layout = ((Batch(batch),), *plain([heads]), (Span(0, tokens),), *plain([width]))
    return Walk.behind(start, layout, tokens)


def _site(found: Legality, attention: fx.Node, drops: bool) -> Site:
    walk = found.walk
    assert walk is not None
    if attention not in walk.layouts:
        raise _why_lost(walk, attention)
    site = find_site(attention)
    layout = walk.layouts.get(site.anchor)
    if layout is None:
        lost = _first_barrier(walk, attention)
        raise Refused(lost[1].reason, lost[0]) if lost else Refused("the tokens do not reach the sum", site.anchor)
    if span_of(layout) != Span(0, walk.tokens):
        raise Refused("a part of the tokens alone goes on from here", site.anchor)
    held = [tuple(map(type, factors)) for factors in layout[:2]]
    if held not in ([(Batch,), (Span,)], [(Span,), (Batch,)]) or not is_plain(layout[2]):
        raise Refused("the residual stream is not laid out as batch, tokens and width", site.anchor)
    steps = list(found.steps(site))
    _check_gain(site, steps)
    if causal(attention) or any(causal(node) for node, step in steps if step.duty is Duty.ATTENTION):
        _refuse_barriers(steps, "a token put back would have seen later ones")
    if drops:
        _refuse_barriers(steps, "dropped tokens cannot be put back")
        for node, step in steps:
            if step.duty is Duty.SUM:
                raise Refused("a sum over the tokens would miss those that are dropped", node)
    return site


@dataclass
class _Behind:
    """The masks of the attentions behind a site: what they keep apart must not merge in front of them. Each is read
    once."""

    program: Program
    walk: Walk
    _told: dict[fx.Node, frozenset[Told]] = field(default_factory=dict)

    def check(self, site: Site, steps: Iterable[tuple[fx.Node, Step]]) -> None:
        """Raises ``Refused`` where an attention behind ``site`` says more of its keys than that of the site."""
        here = self._of(site.attention)
        for node, step in steps:
            if step.duty is not Duty.ATTENTION:
                continue
            if not self._of(node) <= here and arguments(node)["key"] in self.walk.layouts:
                raise Refused("an attention behind hides tokens that this one sees", node)

    def _of(self, attention: fx.Node) -> frozenset[Told]:
        if attention not in self._told:
            check_mask(self.program, attention)
            bias = hiding_bias(self.program, attention)
            added: frozenset[Told] = frozenset() if bias is None else frozenset([("bias", (bias,))])
            self._told[attention] = told_of_keys(attention) | added
        return self._told[attention]


def _check_gain(site: Site, steps: list[tuple[fx.Node, Step]]) -> None:
    """Some work on tokens must follow."""
    if not any(step.heavy and step.layout is not None for _, step in steps):
        node, reason = next(
            ((node, step.reason) for node, step in steps if step.kind is Kind.BARRIER),
            (site.anchor, "no work on tokens follows"),
        )
        raise Refused(f"nothing is saved: {reason}", node)


def _refuse_barriers(steps: list[tuple[fx.Node, Step]], why: str) -> None:
    for node, step in steps:
        if step.kind is Kind.BARRIER:
            raise Refused(f"{why}, and {step.reason}", node)


def _first_barrier(walk: Walk, attention: fx.Node) -> tuple[fx.Node, Step] | None:
    """The barrier that the output of an attention comes to first."""
    reached = {attention}
    for node, step in walk.steps.items():
        if any(source in reached for source in node.all_input_nodes):
            if step.kind is Kind.BARRIER:
                return node, step
            reached.add(node)
    return None


def _why_lost(walk: Walk, attention: fx.Node) -> Refused:
    """The barrier behind which an attention lies, the nearest first."""
    pending, seen = [attention], set[fx.Node]()
    while pending:
        node = pending.pop(0)
        step = walk.steps.get(node)
        if step is not None and step.kind is Kind.BARRIER:
            return Refused(step.reason, node)
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        pending += fresh
    return Refused("it attends to other tokens than the first attention", attention)


def check_mask(program: Program, attention: fx.Node) -> None:
    """Tokens merge only where mask and bias say of each token by itself whether it is there. Raises ``Refused``."""
    hiding_bias(program, attention)
    fill = arguments(attention)["mask_fill"]
    if fill is not None and fill > HIDDEN:
        raise Refused(f"hidden scores are {fill:g}, and keep a weight without the size of a token", attention)
    for part in conjuncts(attention):
        for atom in _atoms(part):
            if isinstance(atom, Same):
                raise Refused(
                    "the attention keeps documents apart, and tokens of two documents must not merge", attention
                )
            if isinstance(atom, Bits | Dense) or (isinstance(atom, Keys | Lengths) and not is_of_keys(part)):
                raise Refused(
                    "the mask of the attention is a tensor that does not say which tokens are padding", attention
                )


def hiding_bias(program: Program, attention: fx.Node) -> fx.Node | None:
    """The bias of an attention, ``[batch or 1, 1, 1, keys]``, where inputs are read for it: it may be a padding mask
    that was written as large negative numbers. None without such a bias. Raises ``Refused`` for what may be another
    mask that was written so: who is hidden from whom is then not known."""
    bias = arguments(attention)["bias"]
    if bias is None:
        return None
    if program.is_made_of_weights(bias):
        (value,) = Probe(program, (), Pool(), program.example).evaluate([bias])
        if bool((value <= HIDDEN).any()):
            raise Refused(
                "the bias of the attention is a mask of large negative numbers, not of truth values", attention
            )
        return None
    if any(not size_equal(size, 1) for size in shape(bias)[-3:-1]):
        raise Refused(
            "the bias of the attention is computed from inputs, and may hide tokens from some rows", attention
        )
    return bias  # type: ignore[no-any-return]


def _atoms(predicate: Predicate) -> Iterator[Predicate]:
    operands = getattr(predicate, "operands", None) or getattr(predicate, "operand", None)
    if operands is None:
        yield predicate
        return
    for operand in operands if isinstance(operands, tuple) else (operands,):
        yield from _atoms(operand)


def causal(attention: fx.Node) -> bool:
    """Whether the mask shows no query a later key."""
    bounds = [part.upper for part in conjuncts(attention) if isinstance(part, Band)]
    return any(upper is not None and Length(0).at_least(upper) for upper in bounds)


def _protect(program: Program, found: Legality, protect: int, protect_end: int) -> None:
    assert found.walk is not None
    steps = found.walk.steps.values()
    held = [found.walk.layouts[site.anchor] for site in found.sites.values()]
    width = shape(next(iter(found.sites.values())).anchor)[2] if held else 1
    dims = {1, *(3 + dim for dim in map(span_dim, held) if dim is not None)}
    ends = [constant_ends(program, found.walk.tokens, width, dim) for dim in dims]
    front, end = map(max, zip(*ends, strict=True))
    found.prefix = max([protect, front, *(step.prefix for step in steps)])
    found.suffix = max([protect_end, end, *(step.suffix for step in steps)])
