"""The layers of a transformer as its residual stream shows them: where each begins, what its feed-forward part adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.nodes import is_call, is_tensor, rank, shape, sizes_equal
from regraft.ir.pointwise import is_cast
from regraft.ir.program import Program
from regraft.passes.attention.lossy import attentions
from regraft.passes.refused import Refused

aten = torch.ops.aten
_NORMS = (aten.layer_norm.default, ops.rms_norm, aten.rms_norm.default)
_LONGEST_WAY = 32


@dataclass(frozen=True)
class Layer:
    """One layer: ``entry``, the stream ``[batch, tokens, width]`` that it reads; ``attention``; ``join``, the sum of
    the stream with what attention gives."""

    entry: fx.Node
    attention: fx.Node
    join: fx.Node


def layers(program: Program) -> list[Layer]:
    """The layers of a recognised program, one for each attention. Raises ``Refused`` where the stream is not seen."""
    return [_layer(site) for site in attentions(program)]


def _layer(site: fx.Node) -> Layer:
    read = _projected(site)
    join = _join_behind(site)
    for node in (read, *([read.args[0]] if is_call(read, _NORMS) else [])):
        if node in join.args:
            return Layer(node, site, join)  # type: ignore[arg-type]
    raise Refused("what the attention reads does not join its output again", read)


def _projected(site: fx.Node) -> fx.Node:
    """What the query is a projection of."""
    node: Any = site.args[0]
    for _ in range(_LONGEST_WAY):
        if not isinstance(node, fx.Node) or node.op != "call_function":
            break
        if is_call(node, (aten.linear.default,)):
            return node.args[0]  # type: ignore[return-value]
        node = node.args[0]
    raise Refused("the query is no projection of the stream", site)


def _join_behind(node: fx.Node) -> fx.Node:
    """The first sum of tokens with tokens that ``node`` goes into."""
    start = node
    for _ in range(_LONGEST_WAY):
        readers = [user for user in node.users if user.target is not aten.sym_size.int]
        if len(readers) != 1 or readers[0].op != "call_function":
            break
        node = readers[0]
        if is_call(node, (aten.add.Tensor,)) and _tokens_and_tokens(node):
            return node
    raise Refused("no residual sum follows", start)


def _tokens_and_tokens(node: fx.Node) -> bool:
    operands = [operand for operand in node.args[:2] if is_tensor(operand)]
    return len(operands) == 2 and rank(node) == 3 and sizes_equal(*map(shape, operands))  # type: ignore[arg-type]


def feed_forward(layer: Layer, following: fx.Node | None) -> fx.Node:
    """What the feed-forward part of a layer adds to the stream. ``following``: the next layer's attention, before which
    it must be. Raises ``Refused``."""
    streams = {layer.join}
    for node in _until(layer.join, following):
        if not is_call(node, (aten.add.Tensor,)) or not _tokens_and_tokens(node):
            if (is_call(node, _NORMS) or is_cast(node)) and node.args[0] in streams:
                streams.add(node)  # a norm behind the sum: the stream itself where norms come last
            continue
        left, right = node.args[:2]
        if left in streams or right in streams:
            added = right if left in streams else left
            if added in streams or not isinstance(added, fx.Node):
                continue
            return added
    raise Refused("no sum of the stream with a feed-forward part follows the attention", layer.join)


def _until(node: fx.Node, stop: fx.Node | None) -> list[fx.Node]:
    found = []
    node = node.next
    while node is not stop and node.op != "output":
        found.append(node)
        node = node.next
    return found
