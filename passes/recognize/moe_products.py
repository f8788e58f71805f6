"""Products of rows by the experts that their ids select: grouped, batched with gathered weights, or piece by piece.

A product piece by piece cuts sorted rows into one piece an expert, by the experts' counts of pairs as numbers, and
joins what each expert makes of its piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import is_call, rank, shape
from regraft.ir.program import Program
from regraft.passes.recognize.moe_experts import Projection, Refused
from regraft.passes.recognize.moe_pieces import read_pieces
from regraft.passes.recognize.moe_rows import Ids, counted_ids, picked, read_ids
from regraft.passes.recognize.moe_weights import projection_of, read_linear

aten = torch.ops.aten

#: Products of sorted rows with one matrix a group: ``(rows, matrices, offsets)``.
GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
#: What a linear layer ends in.
_LINEAR = (aten.linear.default, aten.matmul.default, aten.add.Tensor)


def read_product(node: Any, program: Program) -> tuple[Projection, Ids] | None:
    """A projection of rows by the experts that ``ids`` selects, None for any other node.

    Raises ``Refused`` where the groups of a grouped product are not those of its rows.
    """
    bias: tuple[fx.Node, Any] | None = None
    if is_call(node, (aten.add.Tensor,)):
        for product, added in (node.args[:2], node.args[1::-1]):
            bias = picked(added)
            read = read_product(product, program) if bias is not None and rank(bias[0]) == 2 else None
            if read is not None and bias is not None:
                return _with_bias(read, bias, node)
        return None
    return _grouped(node) or _selected(node) or _piecewise(node, program)


def _with_bias(read: tuple[Projection, Ids], bias: tuple[fx.Node, Any], node: fx.Node) -> tuple[Projection, Ids]:
    projection, ids = read
    picks = read_ids(bias[1])
    if picks.flat is not ids.flat or (picks.order is None if ids.grouped else picks.order is not ids.order):
        raise Refused("the bias is picked by other expert ids than the weight", node)
    with_bias = Projection(projection.rows, projection.weight, bias[0], projection.transposed)
    return with_bias, Ids(ids.flat, picks.order, ids.grouped)


def _grouped(node: Any) -> tuple[Projection, Ids] | None:
    schema = getattr(getattr(node, "target", None), "_schema", None)
    if schema is None or schema.name not in GROUPED:
        return None
    rows, matrices, offsets = node.args[:3] if len(node.args) > 2 else (*node.args[:2], node.kwargs.get("offs"))
    if rank(matrices) != 3 or rank(rows) != 2 or node.kwargs.get("bias") is not None:
        return None
    while is_call(offsets, (aten.to.dtype,)):
        offsets = offsets.args[0]
    flat = counted_ids(offsets.args[0], shape(matrices)[0]) if is_call(offsets, (aten.cumsum.default,)) else None
    if flat is None:
        raise Refused("the groups of the product do not count the pairs of each expert", node)
    weight, transposed = _untransposed(matrices)
    return Projection(rows, weight, None, transposed), Ids(flat, None, grouped=True)


def _piecewise(node: Any, program: Program) -> tuple[Projection, Ids] | None:
    """``cat`` of each expert's linear layer on its piece of the rows."""
    pieces = read_pieces(node)
    if pieces is None or any(not is_call(part, _LINEAR) for part in pieces.made):
        return None
    read = [read_linear(part) for part in pieces.made]
    if [rows for rows, _ in read] != list(pieces.cut):
        return None
    parts = tuple(projection for _, projection in read)
    return projection_of(pieces.rows, parts, program), Ids(pieces.flat, None, grouped=True)


def _selected(node: Any) -> tuple[Projection, Ids] | None:
    """``squeeze(W[ids] @ rows[:, :, None])`` or ``squeeze(rows[:, None] @ W[ids])``."""
    if not is_call(node, (aten.reshape.default,)) or not is_call(node.args[0], (aten.matmul.default,)):
        return None
    left, right = node.args[0].args
    for matrices, rows, turned, unit in ((left, right, False, -1), (right, left, True, -2)):
        select, permuted = _permuted(matrices)
        pick = picked(select)
        if pick is None or rank(pick[0]) != 3 or rank(rows) != 3 or shape(rows)[unit] != 1:
            continue
        if not is_call(rows, (aten.unsqueeze.default, aten.reshape.default)):
            continue
        weight, stored = _permuted(pick[0])
        return Projection(rows.args[0], weight, None, turned ^ permuted ^ stored), read_ids(pick[1])
    return None


def _permuted(node: Any) -> tuple[fx.Node, bool]:
    """``(source, True)`` of a node whose last two of three dims are swapped, else ``(node, False)``."""
    if is_call(node, (aten.permute.default,)) and list(node.args[1]) == [0, 2, 1]:
        return node.args[0], True
    return node, False


def _untransposed(matrices: fx.Node) -> tuple[fx.Node, bool]:
    weight, permuted = _permuted(matrices)
    return weight, not permuted
