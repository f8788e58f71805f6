"""What each operator does to the token axis. ``RULES`` is the table: operator -> rule.

A rule is called where some operand holds tokens. It says where they lie in the result, or why all are needed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.nodes import arguments, rank, shape
from regraft.passes.tokens import layout as axis
from regraft.passes.tokens.attention_rule import attention
from regraft.passes.tokens.layout import Layout, Torn
from regraft.passes.tokens.step import Duty, Kind, Step, barrier, equivariant

if TYPE_CHECKING:
    from regraft.passes.tokens.walk import Walk

aten = torch.ops.aten
TokenRule = Callable[["Walk", fx.Node], Step]
RULES: dict[Any, TokenRule] = {ops.attention: attention}
#: At most this share of the sequence may be protected for what takes tokens by their place.
_LARGEST_END = 4
#: Reductions that count tokens.
_WEIGHING: dict[Any, Duty] = {aten.mean.dim: Duty.MEAN, aten.sum.dim_IntList: Duty.SUM}
_TORN = {
    "tokens": "the tokens are laid out on a grid or in windows",
    "batch": "the batch of the attention is made of windows or groups of the samples",
    "sizes": "the tokens are reshaped in a way that is not understood",
}


def _rule(*targets: Any) -> Callable[[TokenRule], TokenRule]:
    def enter(function: TokenRule) -> TokenRule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return enter


def _from_end(dim: int, node: fx.Node) -> int:
    return dim - rank(node) if dim >= 0 else dim


def _only(walk: Walk, node: fx.Node, name: str) -> tuple[fx.Node, Layout] | None:
    """The operand called ``name`` and its layout, where no other operand holds tokens."""
    source: Any = arguments(node)[name]
    return (source, walk.layouts[source]) if walk.moving(node) == [source] else None


@_rule(ops.glu)
def pointwise(walk: Walk, node: fx.Node) -> Step:
    """Element by element; what it meets is gathered or merged alike."""
    layouts = [walk.layouts[source] for source in walk.moving(node)]
    free = [axis.plain(shape(s)) for s in node.all_input_nodes if s not in walk.layouts and _has_shape(s)]
    found = axis.broadcast([*layouts, *free], rank(node))
    return barrier("tokens meet other tokens at another place") if found is None else equivariant(found)


@_rule(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
def filled(walk: Walk, node: fx.Node) -> Step:
    """One number for each, whatever the tokens hold."""
    found = _only(walk, node, "self")
    return barrier("a number is computed from the tokens") if found is None else equivariant(found[1])


def _has_shape(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


@_rule(aten.linear.default, ops.linear)
def linear(walk: Walk, node: fx.Node) -> Step:
    """A product with a weight, over features."""
    found = _only(walk, node, "input" if node.target is aten.linear.default else "x")
    if found is None:
        return barrier("a weight is computed from the tokens")
    layout = found[1]
    if not axis.is_mixable(layout[-1]):
        return barrier("a linear layer mixes the tokens")
    (features,) = axis.plain(shape(node)[-1:])
    return equivariant((*layout[:-1], (*axis.one_sample(layout[-1]), *features)), heavy=True)


@_rule(aten.matmul.default)
def matmul(walk: Walk, node: fx.Node) -> Step:
    """A product with a matrix that is the same for every token."""
    found = _only(walk, node, "self")
    if found is None or rank(arguments(node)["other"]) != 2 or not axis.is_plain(found[1][-1]):
        return barrier("a matrix product mixes the tokens")
    return equivariant((*found[1][:-1], *axis.plain(shape(node)[-1:])), heavy=True)


@_rule(aten.layer_norm.default, ops.rms_norm, aten.rms_norm.default)
def norm(walk: Walk, node: fx.Node) -> Step:
    """Normalisation over features."""
    found = _only(walk, node, "x" if node.target is ops.rms_norm else "input")
    dims = len(arguments(node)["normalized_shape"]) if node.target is not ops.rms_norm else 1
    if found is None or not all(axis.is_plain(factors) for factors in found[1][-dims:]):
        return barrier("a norm runs over the tokens")
    return equivariant(found[1])


@_rule(aten.batch_norm.default)
def batch_norm(walk: Walk, node: fx.Node) -> Step:
    """Features, in dim 1, scaled and shifted by what training found."""
    found = _only(walk, node, "input")
    if found is None or arguments(node)["training"] or not axis.is_plain(found[1][1]):
        return barrier("a norm runs over the tokens")
    return equivariant(found[1])


@_rule(ops.rope)
def rope(walk: Walk, node: fx.Node) -> Step:
    """Rotation by position, before heads and tokens change places or behind it: the tables are read at the tokens that
    stay."""
    found = _only(walk, node, "x")
    if found is None or not axis.is_plain(found[1][-1]):
        return barrier("rotary embedding of something that is not a sequence of tokens")
    return equivariant(found[1])


@_rule(ops.moe)
def moe(walk: Walk, node: fx.Node) -> Step:
    """Routed experts work row by row."""
    given = arguments(node)
    layout = walk.of(given["hidden"])
    rows = [walk.of(given[name]) for name in ("index", "weight")]
    alike = layout is not None and all(found is not None and found[0] == layout[0] for found in rows)
    if layout is None or not alike or len(walk.moving(node)) != 3:
        return barrier("experts are given tokens in another order than their routes")
    return equivariant(layout, heavy=True)


@_rule(aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten.cumsum.default)
def along(walk: Walk, node: fx.Node) -> Step:
    """Over one dim, which must not be that of the tokens."""
    found = _only(walk, node, "self")
    if found is None or not axis.is_plain(found[1][_from_end(arguments(node)["dim"], node)]):
        return barrier(f"{node.target} runs over the tokens")
    return equivariant(found[1])


@_rule(aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.max.dim, aten.min.dim)
def choice(walk: Walk, node: fx.Node) -> Step:
    """A choice among the features of each token, as a router makes; both results lie alike."""
    found = _only(walk, node, "self")
    if found is None:
        return barrier("the size of a choice is computed from the tokens")
    given = arguments(node)
    layout = found[1]
    place = given["dim"] % len(layout)
    if not axis.is_plain(layout[place]):
        return barrier(f"{node.target} chooses among the tokens")
    first = node.meta["val"][0] if isinstance(node.meta["val"], tuple | list) else node.meta["val"]
    if "keepdim" in given and not given["keepdim"]:
        return equivariant((*layout[:place], *layout[place + 1 :]))
    return equivariant((*layout[:place], *axis.plain(first.shape[place : place + 1]), *layout[place + 1 :]))


@_rule(operator.getitem)
def part(walk: Walk, node: fx.Node) -> Step:
    """One of several results that lie alike."""
    return equivariant(walk.layouts[node.all_input_nodes[0]])


@_rule(aten.gather.default, aten.scatter.value, aten.scatter.src)
def gather(walk: Walk, node: fx.Node) -> Step:
    """Features looked up, or put in their places, for each token."""
    given = arguments(node)
    layouts = [walk.of(given[name]) for name in ("self", "index")]
    dim = _from_end(given["dim"], node)
    if any(layout is None or not axis.is_plain(layout[dim]) for layout in layouts):
        return barrier(f"{node.target} moves tokens")
    own, index = (layout[: len(layout) + dim] + layout[len(layout) + dim + 1 :] for layout in layouts if layout)
    if own != index:
        return barrier(f"{node.target} moves tokens")
    place = dim % rank(node)
    return equivariant((*own[:place], *axis.plain(shape(node)[place : place + 1]), *own[place:]))


@_rule(aten.reshape.default)
def reshape(walk: Walk, node: fx.Node) -> Step:
    """Tokens and batch stay whole."""
    found = _only(walk, node, "self")
    try:
        return equivariant(axis.reshaped(found[1], shape(node)), Duty.RESIZE) if found else barrier("a size is a token")
    except Torn as torn:
        return barrier(_TORN[torn.axis])


@_rule(aten.permute.default)
def permute(walk: Walk, node: fx.Node) -> Step:
    """The axis goes where its dim goes."""
    found = _only(walk, node, "self")
    return equivariant(axis.permuted(found[1], arguments(node)["dims"])) if found else barrier("dims are tokens")


@_rule(aten.unsqueeze.default)
def unsqueeze(walk: Walk, node: fx.Node) -> Step:
    """A dim of one is added."""
    layout = walk.layouts[node.all_input_nodes[0]]
    place = arguments(node)["dim"] % rank(node)
    return equivariant((*layout[:place], (), *layout[place:]))


@_rule(aten.expand.default)
def expand(walk: Walk, node: fx.Node) -> Step:
    """Dims of one are repeated; neither tokens nor batch are."""
    found = _only(walk, node, "self")
    if found is None:
        return barrier("a size is a token")
    result = axis.plain(shape(node))
    old = found[1]
    aligned = [old[d] if -d <= len(old) and old[d] else result[d] for d in range(-len(result), 0)]
    return equivariant(tuple(aligned), Duty.RESIZE)


@_rule(aten.repeat_interleave.self_int)
def repeat_interleave(walk: Walk, node: fx.Node) -> Step:
    """Features and heads may be repeated."""
    found = _only(walk, node, "self")
    dim = arguments(node)["dim"]
    if found is None or dim is None or not axis.is_plain(found[1][_from_end(dim, node)]):
        return barrier("tokens are repeated")
    place = dim % rank(node)
    return equivariant(tuple(axis.plain(shape(node))[d] if d == place else f for d, f in enumerate(found[1])))


@_rule(aten.cat.default)
def cat(walk: Walk, node: fx.Node) -> Step:
    """Beside each other along features, or protected ends put back in front of and behind the tokens."""
    dim = _from_end(arguments(node)["dim"], node)
    if (ends := _with_ends(walk, node, dim)) is not None:
        return ends
    found = axis.broadcast([(*la[:dim], (), *la[len(la) + dim + 1 :]) for la in map(walk.of, _parts(node)) if la],
                           rank(node))  # fmt: skip
    if found is None or any(not axis.is_plain(la[dim]) for la in map(walk.of, _parts(node)) if la):
        return barrier("tokens are put together with others")
    place = dim % rank(node)
    return equivariant((*found[:place], *axis.plain(shape(node)[place : place + 1]), *found[place + 1 :]))


def _with_ends(walk: Walk, node: fx.Node, dim: int) -> Step | None:
    """Tokens between as many others as were cut off: what a rotary embedding of all but a class token does."""
    parts = _parts(node)
    inner = [place for place, part in enumerate(parts) if walk.of(part) is not None]
    if len(inner) != 1 or len(parts) == 1:
        return None
    layout = walk.layouts[parts[inner[0]]]
    span = axis.span_in(layout[dim])
    if span is None or len(layout[dim]) > 1:
        return None
    before, behind = (sum(shape(p)[dim] for p in side) for side in (parts[: inner[0]], parts[inner[0] + 1 :]))
    if (before, behind) != (span.start, walk.tokens - span.stop):
        return None
    place = len(layout) + dim
    whole = (*layout[:place], (axis.Span(0, walk.tokens),), *layout[place + 1 :])
    return Step(Kind.SELECTIVE, Duty.ENDS, whole, prefix=span.start, suffix=walk.tokens - span.stop)


def _parts(node: fx.Node) -> list[Any]:
    return list(arguments(node)["tensors"])


@_rule(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
def reduction(walk: Walk, node: fx.Node) -> Step:
    """Over features, or over all tokens: then each counts by its size, where counting matters."""
    found = _only(walk, node, "self")
    given = arguments(node)
    if found is None or not given["dim"]:
        return barrier("a reduction over everything")
    source, layout = found
    dims = {_from_end(d, source) for d in (given["dim"] if isinstance(given["dim"], list | tuple) else [given["dim"]])}
    over = [layout[dim] for dim in dims]
    left = tuple(
        () if dim - len(layout) in dims else factors
        for dim, factors in enumerate(layout)
        if given["keepdim"] or dim - len(layout) not in dims
    )
    if all(axis.is_plain(factors) for factors in over):
        return equivariant(left)
    if len(over) > 1 or len(over[0]) > 1 or axis.span_in(over[0]) is None:
        return barrier("a reduction over tokens and other things at once")
    return Step(Kind.REDUCIBLE, _WEIGHING.get(node.target, Duty.SAME))


@_rule(aten.select.int)
def select(walk: Walk, node: fx.Node) -> Step:
    """One token at a protected end, or one feature of each token."""
    found = _only(walk, node, "self")
    if found is None:
        return barrier("a token is used as an index")
    source, layout = found
    dim, place = _from_end(arguments(node)["dim"], source), arguments(node)["index"]
    factors = layout[dim]
    if axis.is_plain(factors):
        return equivariant((*layout[: len(layout) + dim], *layout[len(layout) + dim + 1 :]))
    span = axis.span_in(factors)
    if span is None or len(factors) > 1 or not isinstance(place, int):
        return barrier("a sample is taken out of the batch")
    return _ends(walk, None, span.start + place, span.start + place + 1) or barrier(
        f"token {span.start + place} of {walk.tokens} is read, which lies at neither end of the sequence"
    )


@_rule(aten.slice.Tensor)
def slice_(walk: Walk, node: fx.Node) -> Step:
    """Tokens between protected ends, or features of each token."""
    found = _only(walk, node, "self")
    if found is None:
        return barrier("a token is used as an index")
    source, layout = found
    given = arguments(node)
    dim = _from_end(given["dim"], source)
    place = len(layout) + dim
    factors = layout[dim]
    if axis.is_plain(factors):
        return equivariant((*layout[:place], *axis.plain(shape(node)[place : place + 1]), *layout[place + 1 :]))
    span = axis.span_in(factors)
    if span is None or len(factors) > 1 or given["step"] != 1:
        return barrier("samples or every so many tokens are taken")
    start, stop, _ = slice(given["start"], given["end"]).indices(span.size)
    rest = axis.Span(span.start + start, span.start + stop)
    between = (*layout[:place], (rest,), *layout[place + 1 :])
    return _ends(walk, between, rest.start, rest.stop) or barrier(
        f"tokens {rest.start} to {rest.stop - 1} of {walk.tokens} are cut out of the middle of the sequence"
    )


def _ends(walk: Walk, between: Layout | None, start: int, stop: int) -> Step | None:
    """Protect the fewest tokens that make places ``start`` to ``stop`` mean the same; None where that is too many.

    What lies wholly inside a protected end holds no tokens that could go; ``between`` keeps the others.
    """
    tokens = walk.tokens
    ways = [
        Step(Kind.SELECTIVE, Duty.SLICE if between else Duty.SELECT, prefix=stop),
        Step(Kind.SELECTIVE, Duty.SLICE if between else Duty.SELECT, suffix=tokens - start),
    ]
    if between is not None:
        ways.append(Step(Kind.SELECTIVE, Duty.SLICE, between, prefix=start, suffix=tokens - stop))
    best = min(ways, key=lambda step: step.prefix + step.suffix)
    return best if (best.prefix + best.suffix) * _LARGEST_END <= tokens else None
