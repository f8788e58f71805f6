"""Query, key and value of a matched attention as ``[batch, heads, length, head_dim]``, and building the operator.

Handles products of any rank: 2-D and 3-D operands get leading dims of one, 5-D grouped queries are folded into
heads, merged ``batch * heads`` dims are taken apart again when the masks are 4-D. Repeated key and value heads are
read before the repetition.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.mask import Everything
from regraft.ir.nodes import Builder, concrete, dtype, is_tensor, rank, shape, size_equal
from regraft.ir.ops.attention import attention
from regraft.passes.recognize.bias import at_most_four, build_bias, build_slopes
from regraft.passes.recognize.masks import Masks
from regraft.passes.recognize.scores import Refused, Scores

aten = torch.ops.aten


@dataclass
class Heads:
    """The operands of an attention before they are brought to four dims.

    ``leading`` is the node whose dims before the last two are ``[batch, heads]`` (or fewer, or grouped heads);
    ``factor`` the numbers that query and key were multiplied with.
    """

    query: fx.Node
    key: fx.Node
    key_is_transposed: bool
    value: fx.Node
    leading: fx.Node
    factor: float = 1.0


def read_heads(query: fx.Node, key_transposed: fx.Node, value: fx.Node, scores: Scores, root: fx.Node) -> Heads:
    """Check that the operands can be brought to four dims; raises ``Refused``."""
    site = scores.site
    assert site is not None
    if rank(site) > 5 or rank(query) > 5 or rank(query) < 2:
        raise Refused(f"the scores have {rank(site)} dims", site)
    if rank(query) == 5 and rank(site) == 5 and any(rank(item.node) > 3 for item in scores.additions):
        folded = [_fold_mask(item.node) for item in scores.additions]
        if any(node is None for node in folded):
            raise Refused("a mask over grouped heads differs from group to group", site)
    return Heads(query, key_transposed, True, value, site)


def _fold_mask(node: fx.Node) -> fx.Node | None:
    sizes = shape(node)
    return node if len(sizes) <= 3 or all(size == 1 for size in sizes[-4:-2]) else None


def build_attention(
    build: Builder, root: fx.Node, heads: Heads, scores: Scores, masks: Masks, empty_rows: str
) -> fx.Node:
    """The attention operator in front of ``root``, reshaped to ``root``'s shape where that is not 4-D."""
    given = build_operands(build, heads, scores, masks)
    node = build.call(
        attention,
        *given.tensors,
        _sinks(build, scores, given.tensors[0]),
        scale=given.scale,
        mask=given.mask,
        mask_fill=masks.fill,
        empty_rows=empty_rows,
        softcap=scores.softcap,
    )
    return shaped_as(build, node, root)


def _sinks(build: Builder, scores: Scores, query: fx.Node) -> fx.Node | None:
    """The sink logits as a tensor of one number a head."""
    if not isinstance(scores.sinks, float):
        return scores.sinks
    return build.call(aten.new_full.default, query, [build.size(query, 1)], scores.sinks)


@dataclass(frozen=True)
class Operands:
    """What every kind of attention takes first: query, key, value, mask tensors, bias and slopes; scale and mask."""

    tensors: tuple[Any, ...]
    scale: float
    mask: str


def build_operands(build: Builder, heads: Heads, scores: Scores, masks: Masks) -> Operands:
    """The operands of a site in four dims."""
    query, query_factor = _unscaled(build, heads.query)
    key, key_factor = _unscaled(build, heads.key)
    leading = _leading(build, heads)
    query4 = _scaled(build, _four_dims(build, query, leading), scores)
    key4 = _swap_last(build, key) if heads.key_is_transposed else key
    key4, value4 = _ungrouped(build, key4, heads.value, leading)
    query4, key4, value4 = _alike(build, query4, key4, value4)
    lengths = build.size(heads.leading, -2), build.size(heads.key, -1 if heads.key_is_transposed else -2)
    bias = build_bias(build, masks, leading, lengths)
    tables = [at_most_four(build, tensor) for tensor in masks.tensors]
    return Operands(
        (query4, key4, value4, tables, bias, build_slopes(build, masks)),
        scores.scale * query_factor * key_factor,
        "all" if isinstance(masks.predicate, Everything) else str(masks.predicate),
    )


def shaped_as(build: Builder, node: fx.Node, root: fx.Node) -> fx.Node:
    """An attention's output in the shape and element type of what it replaces."""
    if rank(root) != 4 or not all(size_equal(a, b) for a, b in zip(shape(root), shape(node), strict=True)):
        node = build.call(aten.reshape.default, node, build.sizes(root))
    return node if dtype(node) == dtype(root) else build.call(aten.to.dtype, node, dtype(root))


def _alike(build: Builder, *operands: fx.Node) -> list[fx.Node]:
    """The operands in their widest element type: some models compute the scores in fp32 and keep narrow values."""
    widest = functools.reduce(torch.promote_types, map(dtype, operands))
    return [node if dtype(node) == widest else build.call(aten.to.dtype, node, widest) for node in operands]


def _scaled(build: Builder, query: fx.Node, scores: Scores) -> fx.Node:
    """The query, times the factors of the scores that are tensors."""
    for factor, times in scores.factors:
        query = build.call(aten.mul.Tensor if times else aten.div.Tensor, query, factor)
    return query


def _unscaled(build: Builder, node: fx.Node) -> tuple[fx.Node, float]:
    """The node before multiplications by numbers, and their product; a permutation is looked through."""
    factor = 1.0
    while len(node.users) == 1 and node.target in (aten.mul.Tensor, aten.div.Tensor):
        source, number = node.args[:2]
        if not isinstance(number, (int, float)) or not is_tensor(source) or dtype(source) != dtype(node):  # type: ignore[arg-type]
            break
        factor = factor * number if node.target is aten.mul.Tensor else factor / number
        node = source  # type: ignore[assignment]
    if node.target is aten.permute.default and len(node.users) == 1:
        inner, inner_factor = _unscaled(build, node.args[0])  # type: ignore[arg-type]
        if inner is not node.args[0]:
            return build.call(aten.permute.default, inner, node.args[1]), factor * inner_factor
    return node, factor


def _leading(build: Builder, heads: Heads) -> list[Any]:
    """``[batch, heads]`` of the site: missing dims are one, grouped heads ``[kv_heads, groups]`` are multiplied."""
    site = heads.leading
    sizes = shape(site)[:-2]
    if len(sizes) == 3:
        if not all(isinstance(size, int) for size in sizes[1:]):
            raise ValueError("grouped heads have symbolic sizes")
        return [build.size(site, 0), sizes[1] * sizes[2]]
    if len(sizes) == 1 and not isinstance(sizes[0], int):
        return [1, -1]
    return [1] * (2 - len(sizes)) + [build.size(site, dim) for dim in range(len(sizes))]


def _four_dims(build: Builder, node: fx.Node, leading: list[Any]) -> fx.Node:
    if rank(node) == 4 and _same_leading(node, leading):
        return node
    flat = _before_reshape(node, leading)
    if flat is not None:
        return flat
    return build.call(aten.reshape.default, node, [*leading, build.size(node, -2), build.size(node, -1)])


def _same_leading(node: fx.Node, leading: list[Any]) -> bool:
    return all(size_equal(a, b) for a, b in zip(shape(node)[:2], leading, strict=True))


def _before_reshape(node: fx.Node, leading: list[Any]) -> fx.Node | None:
    """The 4-D tensor that a reshape had flattened into ``[batch * heads, length, head_dim]``."""
    if node.target is not aten.reshape.default or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    same_inner = rank(source) == 4 and all(
        size_equal(a, b) for a, b in zip(shape(source)[-2:], shape(node)[-2:], strict=True)
    )
    return source if same_inner and _same_leading(source, leading) else None


def _swap_last(build: Builder, node: fx.Node) -> fx.Node:
    order = [*range(rank(node) - 2), rank(node) - 1, rank(node) - 2]
    source: Any = node
    if node.target is aten.permute.default:
        inner = list(node.args[1])  # type: ignore[arg-type]
        source, order = node.args[0], [inner[dim] for dim in order]
    return source if order == sorted(order) else build.call(aten.permute.default, source, order)


def _ungrouped(build: Builder, key: fx.Node, value: fx.Node, leading: list[Any]) -> tuple[fx.Node, fx.Node]:
    """Key and value with their own number of heads, when both repeat them alike."""
    if rank(key) == 5:
        return _fold_groups(build, key, leading), _fold_groups(build, value, leading)
    key_source, key_groups = _before_repeat(build, key)
    value_source, value_groups = _before_repeat(build, value)
    if key_groups == value_groups and key_groups > 1:
        return key_source, value_source
    return _keys_or_values(build, key, leading), _keys_or_values(build, value, leading)


def _keys_or_values(build: Builder, node: fx.Node, leading: list[Any]) -> fx.Node:
    """Keys or values in four dims; theirs may be fewer heads than the query's, and one batch for all."""
    if rank(node) != 4:
        return _four_dims(build, node, leading)
    if size_equal(shape(node)[0], leading[0]):
        return node
    return build.call(aten.expand.default, node, [leading[0], *(build.size(node, dim) for dim in (1, 2, 3))])


def _fold_groups(build: Builder, node: fx.Node, leading: list[Any]) -> fx.Node:
    """``[batch, kv_heads, 1, length, head_dim]`` without the group dim; other shapes with groups as heads."""
    sizes = [build.size(node, dim) for dim in range(rank(node))]
    if shape(node)[2] == 1:
        return build.call(aten.reshape.default, node, [*sizes[:2], *sizes[3:]])
    return build.call(aten.reshape.default, node, [*leading, *sizes[3:]])


def _before_repeat(build: Builder, node: fx.Node) -> tuple[fx.Node, int]:
    """The node before its heads (dim 1 of 4) were repeated, and how often; permutations are looked through."""
    dims = list(range(rank(node)))
    source = node
    if node.target is aten.permute.default:
        source, dims = node.args[0], list(node.args[1])  # type: ignore[assignment, arg-type]
    if rank(node) != 4 or rank(source) != 4:
        return node, 1
    axis = dims[1]
    if source.target is aten.repeat_interleave.self_int and source.args[2] % 4 == axis:  # type: ignore[operator]
        bare, groups = source.args[0], source.args[1]
    elif source.target is aten.expand.default and _only_heads_expand(source, axis):
        bare, groups = source.args[0], concrete(shape(source)[axis])
    else:
        return node, 1
    assert isinstance(bare, fx.Node) and isinstance(groups, int)
    if dims == sorted(dims):
        return bare, groups
    return build.call(aten.permute.default, bare, dims), groups


def _only_heads_expand(node: fx.Node, axis: int) -> bool:
    before, after = shape(node.args[0]), shape(node)  # type: ignore[arg-type]
    if len(before) != len(after) or before[axis] != 1 or not isinstance(after[axis], int):
        return False
    return all(size_equal(a, b) for dim, (a, b) in enumerate(zip(before, after, strict=True)) if dim != axis)
