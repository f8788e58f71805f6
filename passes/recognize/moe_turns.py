"""One turn of a loop over experts: which expert it is, for which tokens, and with which routing weights."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from regraft.ir.nodes import arguments, is_call, is_tensor, rank, shape
from regraft.passes.recognize.moe_experts import Refused, float_source
from regraft.passes.recognize.moe_rows import ZEROS, distinct

aten = torch.ops.aten


@dataclass(frozen=True)
class Choice:
    """Expert ``number``, chosen where ``index [tokens, top_k]`` is it, weighted by ``weight [tokens,
    top_k]``.

    ``output`` is what is weighted. Where the expert runs on its own tokens alone, ``rows`` are their
    numbers.
    """

    output: fx.Node
    index: fx.Node
    weight: fx.Node
    number: int
    rows: fx.Node | None = None

    def tokens(self, source: fx.Node) -> fx.Node:
        """The tokens that the expert's input is taken from; raises ``Refused``."""
        if self.rows is None:
            return source
        node: Any = source
        if is_call(node, (aten.reshape.default, aten.view.default)):
            node = node.args[0]
        if is_call(node, (aten.index.Tensor,)):
            table, picks = node.args
            if list(picks) == [self.rows]:
                return cast(fx.Node, table)
            lifted = is_call(table, (aten.unsqueeze.default,)) and table.args[1] == -3
            if lifted and list(picks) == [None, self.rows]:
                return cast(fx.Node, table.args[0])
        raise Refused("an expert does not run on the tokens that chose it", source)


def read_choice(term: Any, rows: fx.Node | None) -> Choice | None:
    """The choice behind a weighted output; ``rows`` are those that it is added to, None for all. None when
    ``term`` is not weighted by a router."""
    term = float_source(term) if isinstance(term, fx.Node) else term
    if not is_call(term, (aten.mul.Tensor,)):
        return None
    for output, factor in (term.args, term.args[::-1]):
        if not is_tensor(output) or not is_tensor(factor) or shape(factor)[-1:] != (1,):
            continue
        found = _dense(factor) if rows is None else _sparse(factor, rows)
        if found is not None:
            return Choice(float_source(output), *found, rows)
    return None


Found = tuple[fx.Node, fx.Node, int]


def _dense(factor: Any) -> Found | None:
    """``(index, weight, expert)`` of one number a token: zero where the router did not choose the expert."""
    factor = _unlifted(float_source(factor))
    if is_call(factor, (aten.sum.dim_IntList,)) and list(factor.args[1]) == [-1]:
        return _masked(factor.args[0])
    entry = _entry(factor)
    if entry is None or rank(entry[0]) != 2:
        return None
    table, number = entry
    chosen = _combined(float_source(table))
    return None if chosen is None else (*chosen, number)


def _entry(node: Any) -> tuple[fx.Node, int] | None:
    """``(table, column)`` of a column of a table of two dims."""
    given = arguments(node) if node.op == "call_function" else {}
    if is_call(node, (aten.select.int,)):
        table, dim, number = given["self"], given["dim"], given["index"]
        if is_call(table, (aten.permute.default,)) and list(table.args[1]) == [1, 0]:
            table, dim = table.args[0], -3 - dim
        return (table, number) if dim == -1 and isinstance(number, int) else None
    if is_call(node, (aten.slice.Tensor,)) and given["dim"] == -1 and given["end"] == (given["start"] or 0) + 1:
        return given["self"], given["start"] or 0
    return None


def _masked(node: Any) -> Found | None:
    """``weight`` where ``index == expert``, zero elsewhere."""
    if is_call(node, (aten.mul.Tensor,)):
        for weight, mask in (node.args, node.args[::-1]):
            found = _is_expert(mask)
            if found is not None and is_tensor(weight):
                return found[0], weight, found[1]
    if is_call(node, (aten.where.ScalarOther, aten.where.self)):
        mask, weight, other = node.args
        found = _is_expert(mask)
        if found is not None and (other == 0 or is_call(other, ZEROS)):
            return found[0], weight, found[1]
    return None


def _is_expert(mask: Any) -> tuple[fx.Node, int] | None:
    """``(index, expert)`` of ``index == expert``, or of an entry of its one-hot form."""
    while is_call(mask, (aten.to.dtype,)):
        mask = mask.args[0]
    if is_call(mask, (aten.eq.Scalar,)) and isinstance(mask.args[1], int):
        return mask.args[0], mask.args[1]
    if is_call(mask, (aten.select.int,)) and mask.args[1] == -1 and is_call(mask.args[0], (aten.one_hot.default,)):
        return mask.args[0].args[0], mask.args[2]
    return None


def _combined(table: Any) -> tuple[fx.Node, fx.Node] | None:
    """``(index, weight)`` of a table of every expert's weight for every token."""
    if is_call(table, (aten.scatter.src,)):
        blank, dim, index, weight = table.args
        if is_call(blank, ZEROS) and dim in (1, -1) and distinct(index):
            return index, weight
    if is_call(table, (aten.sum.dim_IntList,)) and list(table.args[1]) == [-2]:
        product = table.args[0]
        if is_call(product, (aten.mul.Tensor,)):
            for hot, weight in (product.args, product.args[::-1]):
                while is_call(hot, (aten.to.dtype,)):
                    hot = hot.args[0]
                if is_call(hot, (aten.one_hot.default,)) and is_call(weight, (aten.unsqueeze.default,)):
                    return hot.args[0], weight.args[0]
    return None


def _sparse(factor: Any, rows: fx.Node) -> Found | None:
    """The routing weights of the pairs that ``where`` finds."""
    factor = _unlifted(float_source(factor))
    if not is_call(factor, (aten.index.Tensor,)) or len(factor.args[1]) != 2:
        return None
    token, slot = list(factor.args[1])
    if token is not rows or not is_call(token, (operator.getitem,)) or not is_call(slot, (operator.getitem,)):
        return None
    pairs = token.args[0]
    if slot.args[0] is not pairs or not is_call(pairs, (aten.where.default, aten.nonzero_numpy.default)):
        return None
    found = _where(pairs.args[0], rows.args[1], slot.args[1])
    return None if found is None else (found[0], _unlifted(factor.args[0]), found[1])


def _where(mask: Any, token_dim: Any, slot_dim: Any) -> tuple[fx.Node, int] | None:
    if (token_dim, slot_dim) == (0, 1):
        found = _is_expert(mask)
        if found is not None:
            return found
    if is_call(mask, (aten.select.int,)) and mask.args[1] == -3 and is_call(mask.args[0], (aten.permute.default,)):
        hot, dims = mask.args[0].args
        wanted = {(0, 1): [2, 0, 1], (1, 0): [2, 1, 0]}.get((token_dim, slot_dim))
        if list(dims) == wanted and is_call(hot, (aten.one_hot.default,)) and rank(hot) == 3:
            return hot.args[0], mask.args[2]
    return None


def _unlifted(node: Any) -> Any:
    """``node`` without a last dimension of one that was added to it."""
    while is_call(node, (aten.unsqueeze.default,)) and node.args[1] == -1:
        node = node.args[0]
    return node
