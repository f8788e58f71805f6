"""Sorted rows cut into one piece for each expert, by its count of token-expert pairs as a number."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from regraft.ir.nodes import arguments, is_call, rank, shape
from regraft.passes.recognize.moe_experts import Refused
from regraft.passes.recognize.moe_rows import counted_ids

aten = torch.ops.aten

#: Nodes of one expert: two or three linear layers, biases, a gate function of a few nodes.
_LONGEST = 40
_NUMBERS = (aten.item.default, aten._local_scalar_dense.default)


@dataclass(frozen=True)
class Pieces:
    """``made``, joined, is what the experts made of ``cut``: the pieces of ``rows`` in the order of the experts.
    ``flat`` are the ids whose counts are the sizes of the pieces."""

    rows: fx.Node
    cut: tuple[fx.Node, ...]
    made: tuple[fx.Node, ...]
    flat: fx.Node


def read_pieces(node: Any) -> Pieces | None:
    """The pieces that a ``cat`` joins, None where it joins no pieces by expert; raises ``Refused`` where the pieces
    are not those of all experts, each of its own count."""
    if not is_call(node, (aten.cat.default,)) or arguments(node)["dim"] not in (0, -2):
        return None
    made = tuple(node.args[0])
    cut = tuple(piece for piece in map(_piece, made) if piece is not None)
    splits = {piece.args[0] for piece in cut}
    if len(cut) != len(made) or len(splits) != 1:
        return None
    split: Any = splits.pop()
    rows, sizes = split.args[:2]
    if arguments(split)["dim"] not in (0, -2) or rank(rows) != 2:
        return None
    counts = entries_of(sizes)
    flat = None if counts is None else counted_ids(counts, len(sizes))
    if flat is None:
        raise Refused("the pieces of the rows are not as long as the counts of each expert's pairs", split)
    if [piece.args[1] for piece in cut] != list(range(len(sizes))):
        raise Refused("the pieces of the rows are not joined in the order of the experts", node)
    return Pieces(rows, cut, made, flat)


def entries_of(sizes: Any) -> fx.Node | None:
    """The tensor whose entries, as numbers and in order, ``sizes`` are."""
    sources: list[Any] = []
    for number, size in enumerate(sizes):
        entry: Any = size.args[0] if is_call(size, _NUMBERS) else None
        if not is_call(entry, (aten.select.int,)) or entry.args[2] != number:
            return None
        sources.append(entry.args[0])
    if len(set(sources)) != 1 or shape(sources[0]) != (len(sources),):
        return None
    return cast(fx.Node, sources[0])


def _piece(node: Any) -> fx.Node | None:
    """The one piece of split rows that an expert's output is computed from."""
    seen: set[fx.Node] = set()
    found: set[fx.Node] = set()
    pending = [node]
    while pending and len(seen) <= _LONGEST:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        if is_call(one, (operator.getitem,)) and is_call(one.args[0], (aten.split_with_sizes.default,)):
            found.add(one)
        elif one.op == "call_function":
            pending += one.all_input_nodes
    return found.pop() if len(found) == 1 else None
