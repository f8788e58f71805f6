"""Where tokens can be reduced: behind the attention of a block, once its output has joined the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.nodes import arguments, is_call, is_tensor, rank, shape, size_equal, sizes_equal
from regraft.ir.pointwise import is_cast, is_pointwise
from regraft.ir.program import Program
from regraft.passes.refused import Refused

aten = torch.ops.aten

#: Norms over features.
NORMS = (aten.layer_norm.default, ops.rms_norm, aten.rms_norm.default)
_PRODUCTS = (aten.linear.default, ops.linear, aten.matmul.default)
#: What may lie between an attention and the sum that it joins: it treats every token alike.
_BETWEEN = (
    *NORMS,
    aten.batch_norm.default,
    *_PRODUCTS,
    aten.reshape.default,
    aten.permute.default,
    aten.mul.Tensor,
    aten.div.Tensor,
)
_JOINS = (aten.add.Tensor,)
_LONGEST_WAY = 24


@dataclass(frozen=True)
class Site:
    """A self-attention and the anchor, ``[batch, tokens, width]`` or the tokens in front, after which tokens may go."""

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
    anchor = user if user is not None and is_call(user, NORMS) else join
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
        if is_call(user, (ops.merge_tokens,)):
            raise Refused("it attends to all tokens, and joins those that an earlier reduction left", node)
        if not (is_call(user, _BETWEEN) or is_cast(user) or _is_unary(user)):
            raise Refused(f"{user.target} stands between the attention and the residual sum", user)
        node = user
    raise Refused("no residual sum follows the attention", attention)


def _is_unary(node: fx.Node) -> bool:
    """Whether a call is a function of each element of its one operand."""
    return is_pointwise(node) and len(node.all_input_nodes) == 1


def _alike(join: fx.Node, node: fx.Node) -> bool:
    """Whether ``join`` adds tokens to tokens: no operand is a bias."""
    operands = [operand for operand in join.args[:2] if is_tensor(operand)]
    return len(operands) == 2 and all(sizes_equal(shape(operand), shape(node)) for operand in operands)  # type: ignore[arg-type]


def _sole_reader(node: fx.Node) -> fx.Node | None:
    readers = [user for user in node.users if user.target is not aten.sym_size.int]
    return readers[0] if len(readers) == 1 and readers[0].op == "call_function" else None


def constant_ends(program: Program, tokens: int, width: Any, dim: int = 1) -> tuple[int, int]:
    """How many tokens in front and at the end come from weights, not from an input: class, distillation and register
    tokens, along ``dim`` of three."""
    front = end = 0
    for node in program.graph.nodes:
        if is_call(node, (aten.cat.default,)) and _is_stream(node, width) and size_equal(shape(node)[dim], tokens):
            ends = [_constants(program, node, _LONGEST_WAY, last, dim) for last in (False, True)]
            if max(ends) < tokens:  # a table of places is all weights
                front, end = max(front, ends[0]), max(end, ends[1])
    return front, end


def _is_stream(node: Any, width: Any) -> bool:
    return is_tensor(node) and rank(node) == 3 and size_equal(shape(node)[2], width)


def _constants(program: Program, node: fx.Node, depth: int, last: bool, dim: int) -> int:
    """How many of the tokens along ``dim`` of three in front, or at the end (``last``), are made of weights alone."""
    tokens = shape(node)[dim]
    if not isinstance(tokens, int) or not depth:
        return 0
    if program.is_made_of_weights(node):
        return tokens
    if is_call(node, (aten.slice.Tensor,)) and arguments(node)["dim"] % 3 == dim and arguments(node)["step"] == 1:
        source, given = arguments(node)["self"], arguments(node)
        whole = int(shape(source)[dim])
        start, stop, _ = slice(given["start"], given["end"]).indices(whole)
        cut = whole - stop if last else start
        return max(0, min(_constants(program, source, depth - 1, last, dim) - cut, stop - start))
    if is_call(node, (aten.cat.default,)) and arguments(node)["dim"] % 3 == dim:
        parts = arguments(node)["tensors"]
        return _constants_of_parts(program, parts[::-1] if last else parts, depth, last, dim)
    if is_pointwise(node):
        operands = [source for source in node.all_input_nodes if is_tensor(source) and _is_aligned(source, node, dim)]
        return min((_constants(program, source, depth - 1, last, dim) for source in operands), default=0)
    return 0


def _constants_of_parts(program: Program, parts: list[fx.Node], depth: int, last: bool, dim: int) -> int:
    count = 0
    for part in parts:
        found = _constants(program, part, depth - 1, last, dim)
        count += found
        if found < shape(part)[dim]:
            break
    return count


def _is_aligned(source: fx.Node, node: fx.Node, dim: int) -> bool:
    """Whether an operand has as many tokens; one that has a single row for all is left out."""
    return rank(source) == rank(node) and size_equal(shape(source)[dim], shape(node)[dim])
