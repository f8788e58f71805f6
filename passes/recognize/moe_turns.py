"""One turn of a loop over experts: which expert it is, for which tokens, and with which routing weights."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from regraft.ir.nodes import is_call, is_tensor, rank, shape, size_equal, sizes_equal
from regraft.passes.recognize.moe_experts import Refused, float_source
from regraft.passes.recognize.moe_rows import ZEROS
from regraft.passes.recognize.moe_table import (
    WHERE,
    named_entry,
    named_index,
    named_place,
    named_tokens,
    top_k_of,
    weighted_index,
    weighted_tokens,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Choice:
    """Expert ``number``, chosen where ``index [tokens, top_k]`` is it, weighted by ``weight [tokens, top_k]``.

    ``index`` may have the dims of the tokens alone, of one expert each. Weight None is one for each; a ``table`` is the
    weight of every expert. ``output`` is what is weighted. Where the expert runs on its own tokens alone, ``rows`` are
    their numbers, or true for them.
    """

    output: fx.Node
    index: fx.Node
    weight: fx.Node | None
    number: int
    table: bool = False
    rows: fx.Node | None = None

    @property
    def routing(self) -> tuple[fx.Node, fx.Node | None, bool]:
        """What all turns of a loop must share."""
        return self.index, self.weight, self.table

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
    """The choice behind an expert's output; ``rows`` are those that it is added to, None for all. None when ``term``
    is not for tokens that a router chose."""
    term = float_source(term) if isinstance(term, fx.Node) else term
    if is_call(term, (aten.mul.Tensor,)):
        for output, factor in (term.args, term.args[::-1]):
            if not is_tensor(output) or not is_tensor(factor) or not rank(factor):
                continue
            if not size_equal(shape(factor)[-1], 1):
                continue
            found = _dense(factor) if rows is None else _sparse(factor, rows)
            if found is not None:
                return Choice(float_source(output), *found, rows=rows)
    if rows is not None:
        tokens = named_tokens(_mask_of(rows))
        return None if tokens is None else Choice(float_source(term), tokens[0], None, tokens[1], rows=rows)
    if is_call(term, WHERE):
        mask, output, other = term.args[:3]
        tokens = named_tokens(_unlifted(mask)) if other == 0 or is_call(other, ZEROS) else None
        if tokens is not None and is_tensor(output) and rank(mask) == rank(term):
            return Choice(float_source(output), tokens[0], None, tokens[1])
    return None


Found = tuple[fx.Node, fx.Node | None, int, bool]


def _dense(factor: Any) -> Found | None:
    """``(index, weight, expert, whether that is a table)`` of one number a token: zero where the router did not choose
    the expert."""
    factor = _unlifted(float_source(factor))
    if is_call(factor, (aten.sum.dim_IntList,)) and list(factor.args[1]) == [-1]:
        return _masked(factor.args[0])
    masked = _masked(factor)
    if masked is not None and rank(masked[0]) == rank(factor):  # of the one expert that a token has
        return masked
    entry = named_entry(factor)
    if entry is not None:
        return _column(*entry)
    tokens = named_tokens(factor)
    return None if tokens is None else (tokens[0], None, tokens[1], False)


def _column(table: fx.Node, number: int) -> Found | None:
    """The column of a table of every expert's weight for every token."""
    table = float_source(table)
    found = weighted_index(table)
    if found is not None:
        return *found, number, False
    index = named_index(table)
    if index is None or top_k_of(index, shape(table)[:-1]) is None:
        return None
    return index, table, number, True


def _masked(node: Any) -> Found | None:
    """``weight`` where ``index == expert``, zero elsewhere."""
    if is_call(node, (aten.mul.Tensor,)):
        for weight, mask in (node.args, node.args[::-1]):
            found = named_place(mask)
            if found is not None and is_tensor(weight) and sizes_equal(shape(weight), shape(mask)):
                return found[0], weight, found[1], False
    if is_call(node, WHERE):
        mask, weight, other = node.args
        found = named_place(mask)
        if found is not None and is_tensor(weight) and (other == 0 or is_call(other, ZEROS)):
            return found[0], weight, found[1], False
    return None


def _sparse(factor: Any, rows: fx.Node) -> Found | None:
    """The routing weights of the pairs that ``where`` finds, or of the tokens that chose one expert."""
    factor = _unlifted(float_source(factor))
    found = _found_pairs(factor, rows)
    mask = _mask_of(rows) if found is None else None
    picked = _at_rows(factor, rows)
    if mask is None or picked is None:
        return found
    dense, weighted = _dense(picked), weighted_tokens(mask)
    if weighted is not None:  # what the mask leaves out has no weight, in this table
        entry = named_entry(picked)
        whole = dense is not None and entry is not None and float_source(entry[0]) is float_source(weighted[2])
        return dense if whole and dense is not None and (dense[0], dense[2]) == weighted[:2] else None
    tokens = named_tokens(mask)
    if tokens is None:
        return None
    index, number = tokens
    if dense is not None:
        return dense if (dense[0], dense[2]) == (index, number) else None
    single = top_k_of(index, shape(picked)) == 1  # the weight of the one expert that a token has
    return (index, picked, number, False) if single else None


def _at_rows(factor: Any, rows: fx.Node) -> fx.Node | None:
    """What a factor is, at all tokens."""
    if is_call(factor, (aten.index.Tensor,)) and list(factor.args[1]) == [rows]:
        return cast(fx.Node, _unlifted(factor.args[0]))
    return None


def _found_pairs(factor: Any, rows: fx.Node) -> Found | None:
    if not is_call(factor, (aten.index.Tensor,)) or len(factor.args[1]) != 2:
        return None
    token, slot = list(factor.args[1])
    if token is not rows or not is_call(token, (operator.getitem,)) or not is_call(slot, (operator.getitem,)):
        return None
    pairs = token.args[0]
    if slot.args[0] is not pairs or not is_call(pairs, _FINDERS):
        return None
    found = _where(pairs.args[0], rows.args[1], slot.args[1])
    return None if found is None else (found[0], _unlifted(factor.args[0]), found[1], False)


_FINDERS = (aten.where.default, aten.nonzero_numpy.default)


def _where(mask: Any, token_dim: Any, slot_dim: Any) -> tuple[fx.Node, int] | None:
    if (token_dim, slot_dim) == (0, 1):
        found = named_place(mask)
        if found is not None:
            return found
    if is_call(mask, (aten.select.int,)) and mask.args[1] == -3 and is_call(mask.args[0], (aten.permute.default,)):
        hot, dims = mask.args[0].args
        wanted = {(0, 1): [2, 0, 1], (1, 0): [2, 1, 0]}.get((token_dim, slot_dim))
        if list(dims) == wanted and is_call(hot, (aten.one_hot.default,)) and rank(hot) == 3:
            return hot.args[0], mask.args[2]
    return None


def _mask_of(rows: Any) -> fx.Node | None:
    """The mask of tokens that ``rows`` are: itself, or what is true at those numbers."""
    if is_tensor(rows) and rows.meta["val"].dtype == torch.bool:
        return cast(fx.Node, rows)
    if is_call(rows, (operator.getitem,)) and rows.args[1] == 0 and is_call(rows.args[0], _FINDERS):
        mask = rows.args[0].args[0]
        return mask if rank(mask) == 1 else None
    source: Any = rows
    while is_call(source, (aten.reshape.default, aten.select.int)):
        source = source.args[0]
    found = is_call(source, (aten.nonzero.default,)) and rank(source.args[0]) == 1
    return source.args[0] if found else None


def _unlifted(node: Any) -> Any:
    """``node`` without a last dimension of one that was added to it."""
    while is_call(node, (aten.unsqueeze.default,)) and node.args[1] == -1:
        node = node.args[0]
    return node
