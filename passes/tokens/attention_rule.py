"""What attention does to the token axis: rows are tokens, and keys add up by their sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from regraft.ir.mask import Everything, parse
from regraft.ir.nodes import arguments, shape
from regraft.passes.tokens import layout as axis
from regraft.passes.tokens.layout import Batch, Layout, Span
from regraft.passes.tokens.step import Duty, Kind, Step, barrier

if TYPE_CHECKING:
    from regraft.passes.tokens.walk import Walk

_OPERANDS = ("query", "key", "value")


def attention(walk: Walk, node: fx.Node) -> Step:
    """Queries, keys and values that hold tokens hold them along their length."""
    given = arguments(node)
    layouts = {name: walk.of(given[name]) for name in _OPERANDS}
    others = [source for source in walk.moving(node) if source not in [given[name] for name in _OPERANDS]]
    if others:
        return barrier("a mask or bias of the attention is computed from the tokens")
    held = {name: layout for name, layout in layouts.items() if layout is not None}
    for layout in held.values():
        along = len(layout) == 4 and len(layout[2]) == 1 and isinstance(layout[2][0], Span)
        if not along or not axis.is_plain(layout[3]):
            return barrier("the attention runs over something else than the tokens")
    key, query = layouts["key"], layouts["query"]
    if (key is None) != (layouts["value"] is None) or (key and layouts["value"] and key[2] != layouts["value"][2]):
        return barrier("keys and values are not the same tokens")
    masked = not isinstance(parse(given["mask"]), Everything)
    for layout in held.values():
        if masked and (len(layout[0]) != 1 or not isinstance(layout[0][0], Batch)):
            return barrier("the mask is of windows or groups of the samples")
    if query is None:
        return Step(Kind.REDUCIBLE, Duty.ATTENTION, heavy=True)
    result: Layout = (*query[:3], *axis.plain(shape(node)[3:]))
    return Step(Kind.REDUCIBLE if key else Kind.EQUIVARIANT, Duty.ATTENTION, result, heavy=True)
