"""Masks that a call's tensors decide are made before the first native call.

Attention alone reads them, so they stand where the first site is lowered: behind the embedding, its norm and the first
projection. What they are made of, mostly an input of the model, is there from the beginning; made first, they do not
part native calls that would otherwise be one segment (``segments.py``), whose values then share one block of memory.
"""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx

from regraft.codegen.cpu.attention_parts import bits_of, padding_mask, span_table, spans_or_bits
from regraft.ir.nodes import is_random

_MAKERS = (padding_mask, span_table, bits_of, spans_or_bits)


def masks_first(graph: fx.Graph, native: Collection[object]) -> None:
    """Move what makes masks in front of the first call of ``native`` in a lowered graph, in place. A mask stays where
    it is if anything that it is made of is made by a native call, writes to memory, or draws random numbers."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    first = next((node for node in order if node.target in native), None)
    if first is None:
        return
    for maker in [node for node in order if node.target in _MAKERS and order[node] > order[first]]:
        chain = _made_behind(maker, order[first], order)
        if all(_is_pure(node) for node in chain):
            for node in sorted(chain, key=order.__getitem__):
                first.prepend(node)
                order[node] = -1  # a mask that shares it finds it moved


def _made_behind(maker: fx.Node, place: int, order: dict[fx.Node, int]) -> set[fx.Node]:
    """A node and all behind ``place`` that it is computed from."""
    chain, left = set[fx.Node](), [maker]
    while left:
        node = left.pop()
        if node not in chain and order[node] >= place:
            chain.add(node)
            left += node.all_input_nodes
    return chain


def _is_pure(node: fx.Node) -> bool:
    if node.target in _MAKERS or node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or is_random(node):
        return False
    return not node.target._schema.is_mutable
