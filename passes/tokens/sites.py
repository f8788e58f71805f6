"""Where tokens can be reduced: behind the attention of a block, once its output has joined the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.nodes import arguments, is_call, is_tensor, rank, shape, size_equal, sizes_equal
from regraft.ir.pointwise import is_cast
from regraft.ir.program import Program
from regraft.passes.refused import Refused

aten = torch.ops.aten

_NORMS = (aten.layer_norm.default, ops.rms_norm, aten.rms_norm.default)
_PRODUCTS = (aten.linear.default, ops.linear, aten.matmul.default)
#: What may lie between an attention and the sum that it joins: it treats every token alike.
_BETWEEN = (*_NORMS, *_PRODUCTS, aten.reshape.default, aten.permute.default, aten.mul.Tensor, aten.div.Tensor)
_JOINS = (aten.add.Tensor,)
_LONGEST_WAY = 24


@dataclass(frozen=True)
class Site:
    """A self-attention and the anchor, ``[batch, tokens, width]``, after which tokens may go."""

    attention: fx.Node
    anchor: fx.Node


def attentions(program: Program) -> list[fx.Node]:
    """The self-attentions of a recognised program, in graph order."""
    return [node for node in program.graph.nodes if node.target is ops.attention and _is_self_attention(node)]


def _is_self_attention(node: fx.Node) -> bool:
    given = arguments(node)
    query, key = given["query"], given["key"]
    return size_equal(shape(query)[2], shape(key)[2]) and projected(query) is projected(key)


def projected(node: fx.Node) -> fx.Node | None:
    """What a query or key is a projection of."""
    found = projection(node)
    return None if found is None else found.all_input_nodes[0]


def projection(node: fx.Node) -> fx.Node | None:
    """The product that makes a query, key or value."""
    for _ in range(_LONGEST_WAY):
        if is_call(node, _PRODUCTS):
            return node
        if node.op != "call_function" or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return None


def find_site(attention: fx.Node) -> Site:
    """The site behind an attention. Raises ``Refused``."""
    join = join_of(attention)
    while (user := _sole_reader(join)) is not None and is_call(user, _JOINS) and _alike(user, join):
        join = user
    user = _sole_reader(join)
    anchor = user if user is not None and is_call(user, _NORMS) else join
    if rank(anchor) != 3:
        raise Refused(f"the residual stream has {rank(anchor)} dims, not batch, tokens and width", anchor)
    return Site(attention, anchor)


def join_of(attention: fx.Node) -> fx.Node:
    """The first sum of the attention's output with something else. Raises ``Refused``."""
    node = attention
    for _ in range(_LONGEST_WAY):
        user = _sole_reader(node)
        if user is None:
            raise Refused("what the attention gives is read in several places, or by nothing", node)
        if is_call(user, _JOINS) and _alike(user, node):
            return user
        if not (is_call(user, _BETWEEN) or is_cast(user)):
            raise Refused(f"{user.target} stands between the attention and the residual sum", user)
        node = user
    raise Refused("no residual sum follows the attention", attention)


def _alike(join: fx.Node, node: fx.Node) -> bool:
    """Whether ``join`` adds tokens to tokens: no operand is a bias."""
    operands = [operand for operand in join.args[:2] if is_tensor(operand)]
    return len(operands) == 2 and all(sizes_equal(shape(operand), shape(node)) for operand in operands)  # type: ignore[arg-type]


def _sole_reader(node: fx.Node) -> fx.Node | None:
    readers = [user for user in node.users if user.target is not aten.sym_size.int]
    return readers[0] if len(readers) == 1 and readers[0].op == "call_function" else None


def leading_constants(program: Program, tokens: int, width: Any) -> int:
    """How many tokens in front come from weights, not from an input: class, distillation and register tokens."""
    most = 0
    for node in program.graph.nodes:
        if not is_call(node, (aten.cat.default,)) or rank(node) != 3 or not is_tensor(node):
            continue
        if arguments(node)["dim"] % 3 != 1 or not size_equal(shape(node)[1], tokens):
            continue
        if size_equal(shape(node)[2], width):
            most = max(most, sum(_leading(program, arguments(node)["tensors"])))
    return most if most < tokens else 0


def _leading(program: Program, parts: list[fx.Node]) -> Iterator[int]:
    for part in parts:
        if not is_tensor(part) or not program.is_made_of_weights(part):
            return
        yield int(shape(part)[1])
