"""What each operator that is not pointwise does to the expert axis. ``RULES`` is the table: operator -> rule.

A rule is called where some input changes. It returns the effect on the result, a tuple for several results (None: not
understood, refused when read), and raises ``Refused``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from regraft.ir.nodes import FILLED_LIKE, arguments, is_tensor, rank, shape
from regraft.passes.experts import expert_axis as axis
from regraft.passes.experts.expert_axis import SAME, Along, Effect, Grouped, Numbers, Same
from regraft.passes.refused import Refused

if TYPE_CHECKING:
    from regraft.passes.experts.walk import Walk

aten = torch.ops.aten
Effects = Effect | tuple[Effect | None, ...]
AxisRule = Callable[["Walk", fx.Node], Effects]
RULES: dict[Any, AxisRule] = {}


def _rule(*targets: Any) -> Callable[[AxisRule], AxisRule]:
    def enter(function: AxisRule) -> AxisRule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return enter


def _kept(effect: Effect | None, node: fx.Node) -> Effect:
    if effect is None:
        raise Refused("the router cuts the axis of the experts in a way that is not understood", node)
    return effect


def _source(walk: Walk, node: fx.Node) -> tuple[fx.Node, Effect]:
    """The tensor that moves, and its effect; its other inputs must not change."""
    source: Any = node.args[0]
    for other in node.all_input_nodes:
        if other is not source and not isinstance(walk.of(other), Same):
            raise Refused(f"the router uses {node.target} on values of the experts, which is not understood", node)
    return source, walk.of(source)


def _from_end(dim: int, source: fx.Node) -> int:
    return dim - rank(source) if dim >= 0 else dim


def _dims(given: Any, source: fx.Node) -> set[int]:
    """The dims of a reduction, from the end; none given means all."""
    if given is None or given == []:
        return set(range(-rank(source), 0))
    return {_from_end(dim, source) for dim in (given if isinstance(given, (list, tuple)) else [given])}


@_rule(
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def reshape(walk: Walk, node: fx.Node) -> Effects:
    """The axis stays whole, is split into groups or merged from them."""
    source, effect = _source(walk, node)
    if isinstance(effect, (Same, Numbers)):
        return effect
    result = axis.reshaped(effect, shape(source), shape(node), walk.experts)
    if isinstance(result, Grouped):
        walk.whole_groups(result.parts)
    return _kept(result, node)


@_rule(aten.expand.default)
def expand(walk: Walk, node: fx.Node) -> Effects:
    """Values of groups may be repeated for their experts."""
    source, effect = _source(walk, node)
    if isinstance(effect, (Same, Numbers)):
        return effect
    return axis.expanded(effect, shape(source), shape(node), walk.experts)


@_rule(aten.repeat_interleave.self_int)
def repeat_interleave(walk: Walk, node: fx.Node) -> Effects:
    """Repeating the values of groups as often as they have experts gives values of experts."""
    source, effect = _source(walk, node)
    if isinstance(effect, (Same, Numbers)):
        return effect
    given = arguments(node)
    if given["dim"] is None:
        return _kept(None, node)
    dim = _from_end(given["dim"], source)
    if dim not in axis.spanned(effect):
        return effect
    whole = isinstance(effect, Along) and given["repeats"] == walk.experts // effect.parts
    return _kept(Along(dim, walk.experts) if whole else None, node)


@_rule(aten.permute.default)
def permute(walk: Walk, node: fx.Node) -> Effects:
    """The axis goes where its dim goes."""
    _, effect = _source(walk, node)
    if isinstance(effect, (Same, Numbers)):
        return effect
    return _kept(axis.permuted(effect, arguments(node)["dims"]), node)


@_rule(aten.slice.Tensor, aten.select.int)
def cut(walk: Walk, node: fx.Node) -> Effects:
    """Other dims may be cut."""
    source, effect = _source(walk, node)
    if isinstance(effect, (Same, Numbers)):
        return effect
    dim = _from_end(arguments(node)["dim"], source)
    if dim in axis.spanned(effect):
        raise Refused("the router takes some experts by their place", node)
    if node.target is aten.slice.Tensor:
        return effect
    return _kept(axis.without(effect, {dim}, keep=False), node)


@_rule(
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.logsumexp.default,
    aten.any.dim,
    aten.all.dim,
    aten.prod.dim_int,
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
)
def reduction(walk: Walk, node: fx.Node) -> Effects:
    """A reduction that does not see the order of what it reduces."""
    source, effect = _source(walk, node)
    given = arguments(node)
    dims = _dims(given["dim"], source)
    if isinstance(effect, Numbers):
        raise Refused("the router computes with the numbers of experts, which is not understood", node)
    return SAME if isinstance(effect, Same) else _kept(axis.without(effect, dims, bool(given["keepdim"])), node)


@_rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax(walk: Walk, node: fx.Node) -> Effects:
    """Over the axis or beside it, but not over groups apart from their experts."""
    source, effect = _source(walk, node)
    grouped = isinstance(effect, Grouped) and _from_end(arguments(node)["dim"], source) == effect.dim
    return _kept(None if grouped or isinstance(effect, Numbers) else effect, node)


@_rule(aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim)
def choice(walk: Walk, node: fx.Node) -> Effects:
    """The largest values are the same, the numbers of those that have them move; inside groups, groups move."""
    source, effect = _source(walk, node)
    if not isinstance(effect, (Along, Grouped)):
        return _kept(None, node)
    given = arguments(node)
    dim, reduced = _from_end(given["dim"], source), node.target in (aten.max.dim, aten.min.dim)
    if isinstance(effect, Along) and dim == effect.dim:
        return SAME, Numbers(effect.parts)
    if dim not in axis.spanned(effect):
        moved = axis.without(effect, {dim}, keep=bool(given["keepdim"])) if reduced else effect
        return moved, moved
    if dim == effect.dim:
        return None, None
    return Along(effect.dim + 1 if reduced and not given["keepdim"] else effect.dim, effect.parts), None


@_rule(aten.argmax.default, aten.argmin.default)
def best(walk: Walk, node: fx.Node) -> Effects:
    """The number of the best expert or group."""
    source, effect = _source(walk, node)
    dim = arguments(node)["dim"]
    if not isinstance(effect, Along) or dim is None or _from_end(dim, source) != effect.dim:
        return _kept(None, node)
    return Numbers(effect.parts)


@_rule(aten.argsort.default, aten.argsort.stable)
def order(walk: Walk, node: fx.Node) -> Effects:
    """Numbers of experts or groups, the best first."""
    source, effect = _source(walk, node)
    if not isinstance(effect, Along) or _from_end(arguments(node)["dim"], source) != effect.dim:
        return _kept(None, node)
    return Numbers(effect.parts)


@_rule(aten.gather.default)
def gather(walk: Walk, node: fx.Node) -> Effects:
    """Values looked up by number do not change."""
    given = arguments(node)
    return _looked_up(walk, node, given["self"], given["dim"], given["index"])


@_rule(aten.index_select.default)
def index_select(walk: Walk, node: fx.Node) -> Effects:
    """As gather, for a table."""
    given = arguments(node)
    return _looked_up(walk, node, given["self"], given["dim"], given["index"])


@_rule(aten.embedding.default)
def embedding(walk: Walk, node: fx.Node) -> Effects:
    """As gather, for rows."""
    given = arguments(node)
    return _looked_up(walk, node, given["weight"], 0, given["indices"])


@_rule(aten.index.Tensor)
def index(walk: Walk, node: fx.Node) -> Effects:
    """As gather, where one index is given."""
    table: Any = node.args[0]
    picks: Any = node.args[1]
    dims = [dim for dim, pick in enumerate(picks) if pick is not None]
    if len(dims) != 1:
        return _kept(None, node)
    return _looked_up(walk, node, table, dims[0], picks[dims[0]])


def _looked_up(walk: Walk, node: fx.Node, table: fx.Node, dim: int, numbers: fx.Node) -> Effect:
    effect = walk.of(numbers)
    if isinstance(effect, Same) and isinstance(walk.of(table), Numbers):
        return walk.of(table)  # a choice among the numbers chosen before
    if not isinstance(effect, Numbers):
        raise Refused("the router looks values of the experts up by something else than their numbers", node)
    walk.fit(node, table, Along(_from_end(dim, table), effect.parts))
    return SAME


@_rule(aten.scatter.value, aten.scatter.src, aten.scatter_add.default)
def scatter(walk: Walk, node: fx.Node) -> Effects:
    """Values written at the places of numbers move with them."""
    given = arguments(node)
    effect, table = walk.of(given["index"]), given["self"]
    written = given.get("src")
    if not isinstance(effect, Numbers) or (is_tensor(written) and not isinstance(walk.of(written), Same)):
        raise Refused("the router writes values of the experts by something else than their numbers", node)
    result = Along(_from_end(given["dim"], table), effect.parts)
    walk.fit(node, table, result)
    return result


@_rule(aten.one_hot.default)
def one_hot(walk: Walk, node: fx.Node) -> Effects:
    """A place for each expert."""
    effect = walk.of(node.args[0])
    if not isinstance(effect, Numbers) or shape(node)[-1] != effect.parts:
        return _kept(None, node)
    return Along(-1, effect.parts)


@_rule(
    *FILLED_LIKE,
    aten.empty_like.default,
    aten.sym_size.int,
)
def shape_only(walk: Walk, node: fx.Node) -> Effects:
    """Only the shape is read."""
    return SAME


@_rule(
    aten.sum.default,
    aten.mean.default,
    aten.max.default,
    aten.min.default,
    aten.any.default,
    aten.all.default,
)
def full_reduction(walk: Walk, node: fx.Node) -> Effects:
    """One number of all."""
    _, effect = _source(walk, node)
    return _kept(None if isinstance(effect, Numbers) else SAME, node)
