"""Query, key and value of a matched attention as ``[batch, heads, length, head_dim]``, and building the operator.

Handles products of two to five dims (``leading.py``); merged ``batch * heads`` dims are taken apart again when the
masks are 4-D. Repeated key and value heads are read before the repetition.
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
from regraft.passes.recognize.leading import Leading, read_leading
from regraft.passes.recognize.masks import Masks
from regraft.passes.recognize.scores import Refused, Scores

aten = torch.ops.aten


@dataclass
class Heads:
    """The operands of an attention before they are brought to four dims.

    ``leading`` makes two dims, batch and heads, of those in front; query and key broadcast to ``product``, the value
    to ``root``.
    """

    query: fx.Node
    key: fx.Node
    key_is_transposed: bool
    value: fx.Node
    leading: Leading
    product: fx.Node
    root: fx.Node


def read_heads(
    query: fx.Node, key_transposed: fx.Node, value: fx.Node, product: fx.Node, scores: Scores, root: fx.Node
) -> Heads:
    """Check that the operands can be brought to four dims; raises ``Refused``."""
    site = scores.site
    assert site is not None
    if rank(site) > 5 or rank(product) > 5 or rank(root) > 5 or rank(query) < 2:
        raise Refused(f"the scores have {rank(site)} dims", site)
    leading = read_leading(site, scores.maskings)
    for node, within in ((query, product), (key_transposed, product), (value, root)):
        leading.check(node, within)
    if not leading.reaches(root):
        raise Refused("the values have more batches or heads than the scores", root)
    return Heads(query, key_transposed, True, value, leading, product, root)


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
    query4 = heads.leading.placed(build, _scaled(build, query, scores), heads.product)
    key = _swap_last(build, key) if heads.key_is_transposed else key
    key4, value4 = _keys_and_values(build, key, heads)
    query4, key4, value4 = _alike(build, query4, key4, value4)
    lengths = build.size(heads.leading.site, -2), build.size(heads.key, -1 if heads.key_is_transposed else -2)
    bias = build_bias(build, masks, heads.leading.sizes(build), lengths)
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
    """The query, times the factors of the scores that are tensors: they broadcast to the product's dims."""
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


def _swap_last(build: Builder, node: fx.Node) -> fx.Node:
    order = [*range(rank(node) - 2), rank(node) - 1, rank(node) - 2]
    source: Any = node
    if node.target is aten.permute.default:
        inner = list(node.args[1])  # type: ignore[arg-type]
        source, order = node.args[0], [inner[dim] for dim in order]
    return source if order == sorted(order) else build.call(aten.permute.default, source, order)


def _keys_and_values(build: Builder, key: fx.Node, heads: Heads) -> tuple[fx.Node, fx.Node]:
    """Key and value with one number of heads: their own, when both repeat or share them alike, else the query's."""
    value, leading = heads.value, heads.leading
    key_source, key_groups = _before_repeat(build, key)
    value_source, value_groups = _before_repeat(build, value)
    if key_groups == value_groups and key_groups > 1:
        key, value = key_source, value_source
    own = size_equal(leading.heads_of(key, heads.product), leading.heads_of(value, heads.root))
    return leading.placed(build, key, heads.product, own), leading.placed(build, value, heads.root, own)


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
