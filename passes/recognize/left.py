"""Attention, norms and rotations that no rule took, and whose nodes no rule gave a reason for.

A rule refuses what matches its pattern up to the landmark; a spelling that leaves the pattern before is no match of
anything. What such nodes compute together is seen from their data flow alone, and said in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.nodes import (
    arguments,
    is_call,
    is_tensor,
    is_view,
    rank,
    shape,
    size_equal,
    sizes_equal,
    user_line,
)
from regraft.ir.pointwise import is_pointwise
from regraft.ir.program import Program
from regraft.ir.records import Refusal
from regraft.ir.rule import Rule
from regraft.passes.base import Pass
from regraft.passes.recognize.attention import SOFTMAXES, RecognizeAttention
from regraft.passes.recognize.attention_mapped import RecognizeMappedAttention
from regraft.passes.recognize.layer_norm import RecognizeLayerNorm
from regraft.passes.recognize.rms_norm import RecognizeRmsNorm
from regraft.passes.recognize.rope import RecognizeRope

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
_SPREADS = (aten.std.dim, aten.std.correction, aten.var.dim, aten.var.correction)
_MEANS = (aten.mean.dim, aten.sum.dim_IntList)
_INVERSES = (aten.rsqrt.default, aten.reciprocal.default, aten.pow.Tensor_Scalar)
_OTHER_MAPS = (
    aten.silu.default,
    aten.pow.Tensor_Scalar,
    aten.exp.default,
    aten.tanh.default,
    aten.softplus.default,
    aten.leaky_relu.default,
    ops.activation,
)
_STACK = aten.stack.default  # of tables: the entries of a matrix that turns
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.convolution.default)
_MOVES = (aten.reshape.default, aten.permute.default, aten.flip.default, aten.roll.default, aten.cat.default)


@dataclass(frozen=True)
class _Site:
    """What was left: the rule that is for it, the node to name, all nodes that a reason may be about."""

    rule: Rule
    node: fx.Node
    about: frozenset[fx.Node]
    reason: str


@dataclass(frozen=True)
class ReportLeftSites(Pass):
    """Refuse, for the report, attention, norms and rotations that are left and that no rule gave a reason for. Changes
    nothing."""

    def run(self, program: Program, session: Session) -> int:
        for find in (_attentions, _mapped_attentions, _norms, _rotations):
            for site in find(program):
                kind = site.rule.recognizes
                told = [refusal for refusal in session.log.refusals if refusal.recognizes == kind]
                named, lines = {refusal.node for refusal in told}, {refusal.user_line for refusal in told}
                line = user_line(site.node)
                if line not in lines and not any(node.name in named for node in site.about):
                    session.log.refusals.append(
                        Refusal(site.rule.name, self.name, "pattern", site.node.name, site.reason, line, kind)
                    )
        return 0


def _attentions(program: Program) -> Iterator[_Site]:
    """A softmax over the scores of two activations that weighs values."""
    for node in program.graph.nodes:
        if not is_call(node, SOFTMAXES) or node.args[1] not in (-1, rank(node) - 1):
            continue
        before = _walk(node, _sources, lambda n: is_call(n, (aten.matmul.default,)) and _of_activations(n, program))
        after = _walk(node, _readers, _weighs)
        if before is None or after is None:
            continue
        between = [n for n in (*before[1:-1], *after[1:-1]) if not is_view(n) and n.target not in _MOVES]
        calls = ", ".join(dict.fromkeys(str(n.target) for n in between)) or str(after[-1].target)
        reason = f"between queries, keys and values stands what no attention operator has: {calls}"
        yield _Site(RecognizeAttention(), node, frozenset((*before, *after)), reason)


def _mapped_attentions(program: Program) -> Iterator[_Site]:
    """A map of the scores of two activations, other than those that the operator has, that weighs values."""

    def product(node: fx.Node) -> bool:
        return is_call(node, (aten.matmul.default,)) and _of_activations(node, program)

    for node in program.graph.nodes:
        if not is_call(node, _OTHER_MAPS):
            continue
        before = _walk(node, _operands, product)
        after = _walk(node, _mapped_readers, product)
        if before is not None and after is not None and after[-1].args[0] is after[-2]:
            name = arguments(node).get("activation", node.target)
            reason = f"scores become weights by {name}, and the maps that are read are sigmoid, relu, elu + 1 and gelu"
            yield _Site(RecognizeMappedAttention(), node, frozenset((*before, *after)), reason)


def _operands(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes if is_pointwise(node) or is_view(node) else []


def _mapped_readers(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.users if is_pointwise(n) or is_view(n) or is_call(n, (aten.matmul.default,))]


def _of_activations(product: fx.Node, program: Program) -> bool:
    return not any(program.is_made_of_weights(operand) for operand in product.all_input_nodes)


def _weighs(node: fx.Node) -> bool:
    return is_call(node, (aten.matmul.default,)) or (
        is_call(node, (aten.sum.dim_IntList,)) and is_call(node.args[0], (aten.mul.Tensor,))
    )


def _sources(node: fx.Node) -> list[fx.Node]:
    """What scores are made of: the operands of a map, the first one of what moves or mixes them."""
    if is_pointwise(node):
        return node.all_input_nodes
    moved = is_view(node) or node.target in _MOVES or _mixes(node) or is_call(node, SOFTMAXES)
    return node.all_input_nodes[:1] if moved else []


def _readers(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.users if is_pointwise(n) or is_view(n) or n.target in _MOVES or _mixes(n) or _weighs(n)]


def _mixes(node: fx.Node) -> bool:
    """A linear layer or a convolution from as many numbers to as many: it mixes heads, or scores nearby."""
    if is_call(node, _CONVOLUTIONS):
        return sizes_equal(shape(node), shape(node.args[0]))  # type: ignore[arg-type]
    sizes = shape(node.args[1]) if is_call(node, (aten.linear.default,)) else ()  # type: ignore[arg-type]
    return len(sizes) == 2 and size_equal(*sizes)


def _walk(
    start: fx.Node, step: Callable[[fx.Node], list[fx.Node]], ends: Callable[[fx.Node], bool], limit: int = 200
) -> list[fx.Node] | None:
    """The shortest way from ``start`` to a node where ``ends`` holds, both included."""
    ways, seen = [[start]], {start}
    for way in ways:
        if len(seen) > limit:
            return None
        for node in step(way[-1]):
            if ends(node):
                return [*way, node]
            if node not in seen:
                seen.add(node)
                ways.append([*way, node])
    return None


def _norms(program: Program) -> Iterator[_Site]:
    """A tensor divided by its own spread or length, and weighed."""
    for node in program.graph.nodes:
        if not is_call(node, _PRODUCTS) or not is_tensor(node) or rank(node) < 2:
            continue
        for x, by in (node.args[:2], node.args[1::-1]):
            way = _to_own_size(x, by) if is_tensor(x) and is_tensor(by) else None
            inverted = is_call(node, (aten.div.Tensor,)) and by is node.args[1]
            if way is None or not (inverted or any(is_call(n, _INVERSES) for n in way)) or not _weighed(node, program):
                continue
            centred = is_call(way[-1], _SPREADS) or is_call(x, (aten.sub.Tensor,))
            rule: Rule = RecognizeLayerNorm() if centred else RecognizeRmsNorm()
            calls = ", ".join(dict.fromkeys(str(n.target) for n in reversed(way)))
            reason = f"what divides is not the root of a mean of squares plus eps, but {calls}"
            yield _Site(rule, node, frozenset((node, *way, *node.users)), reason)
            break


def _to_own_size(x: Any, by: Any) -> list[fx.Node] | None:
    """The way from a divisor of one number a row back to the reduction of ``x`` that it is made of."""
    if rank(x) == 0 or _is_one_a_row(x) or not _is_one_a_row(by):
        return None
    way = _walk(by, lambda n: _rows_of(n) if is_pointwise(n) else [], _reduces)
    if way is None and _reduces(by):
        way = [by]
    if way is None:
        return None
    reduced: Any = way[-1].args[0]
    squared = is_call(reduced, (aten.pow.Tensor_Scalar,)) and reduced.args[1] == 2
    squared = squared or (is_call(reduced, (aten.mul.Tensor,)) and reduced.args[0] is reduced.args[1])
    if is_call(way[-1], _MEANS):
        reduced = reduced.args[0] if squared else None
    return way if reduced in _scaled_or_centred(x) else None


def _scaled_or_centred(x: fx.Node) -> set[fx.Node]:
    """``x`` and what it is a multiple or the centred form of."""
    found, pending = {x}, [x]
    while pending:
        node = pending.pop()
        if is_call(node, (aten.mul.Tensor, aten.sub.Tensor)):
            operands = [n for n in node.args[:2] if is_tensor(n) and n not in found]
            found.update(operands)  # type: ignore[arg-type]
            pending += operands  # type: ignore[arg-type]
    return found


def _rows_of(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if _is_one_a_row(n)]


def _is_one_a_row(node: Any) -> bool:
    return is_tensor(node) and rank(node) > 0 and size_equal(shape(node)[-1], 1)


def _reduces(node: fx.Node) -> bool:
    return is_call(node, (*_SPREADS, *_MEANS, aten.linalg_vector_norm.default)) and _is_one_a_row(node)


def _weighed(node: fx.Node, program: Program) -> bool:
    """Whether a weight of the features multiplies the normed tensor, or what is normed."""
    around = [n for n in (*node.users, *node.all_input_nodes, node) if is_call(n, (aten.mul.Tensor,))]
    sides: list[Any] = [side for product in around for side in product.args[:2] if is_tensor(side)]
    return any(
        rank(side) > 0 and size_equal(shape(side)[-1], shape(node)[-1]) and program.is_made_of_weights(side)
        for side in sides
    )


def _rotations(program: Program) -> Iterator[_Site]:
    """A sum of two activations, one times the cos and one times the sin of the same angles."""
    for cosine in program.graph.nodes:
        if not is_call(cosine, (aten.cos.default,)):
            continue
        sines = [n for n in cosine.args[0].users if is_call(n, (aten.sin.default,))]
        if not sines:
            continue
        turned = [_turned_by(table, program) for table in (cosine, sines[0])]
        for total in dict.fromkeys(user for product in turned[0] for user in product.users):
            if is_call(total, _SUMS) and all(any(arg in side for arg in total.args) for side in turned):
                reason = (
                    "cos and sin of one angle weigh two tensors, and not as x * cos + turn(x) * sin or as pairs "
                    "(a * cos - b * sin, b * cos + a * sin)"
                )
                about = {total, *total.users, *total.all_input_nodes}
                yield _Site(RecognizeRope(), total, frozenset(about), reason)


def _turned_by(table: fx.Node, program: Program) -> dict[fx.Node, None]:
    """The products of activations with a table, or with what is made of it by maps and views, as they are met."""
    products, pending, seen = dict[fx.Node, None](), [table], {table}
    while pending:
        node = pending.pop()
        for user in node.users:
            others = [n for n in user.all_input_nodes if n is not node and is_tensor(n)]
            if is_call(user, (aten.mul.Tensor,)) and any(not program.is_made_of_weights(n) for n in others):
                products[user] = None
            elif user not in seen and (is_pointwise(user) or is_view(user) or user.target in (*_MOVES, _STACK)):
                seen.add(user)
                pending.append(user)
    return products
