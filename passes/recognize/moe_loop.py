"""Recognise routed experts written as a loop over the experts, which export unrolls.

Each turn adds ``coefficient * expert(rows)``. Either every expert runs on all tokens and the coefficient is
zero where the router did not choose it, or ``where`` finds the tokens of the expert, and ``index_add`` or an
assignment adds its outputs to their rows. The experts' weights are separate tensors, which are stacked, or
slices of a stacked one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import Builder, arguments, is_call, is_tensor, rank, shape, size_equal
from regraft.ir.pattern import add, anything, either, operator
from regraft.ir.program import Program
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.ir.weights import WeightOp
from regraft.passes.recognize import moe_loop_examples as shown
from regraft.passes.recognize.moe_experts import (
    Experts,
    Gate,
    Projection,
    Refused,
    build_experts,
    float_source,
    read_gate,
)
from regraft.passes.recognize.moe_turns import ZEROS, Choice, read_choice

aten = torch.ops.aten
index_add = operator(aten.index_add.default)
index_put = operator(aten.index_put.default)


class RecognizeMoeLoop(Rule):
    """A sum over experts, one term an expert, weighted by what the router gives it."""

    recognizes = "moe"
    examples = shown.LOOPS
    near_misses = shown.LOOPS_NEAR_MISSES

    def pattern(self, left: Any, right: Any) -> Any:
        return either(
            index_add(left, anything(), anything(), right),
            index_put(left, anything(), right),
            add(left, right),
        )

    def check(self, match: Match) -> Iterator[Requirement]:
        found = analyse(match)
        if isinstance(found, Refused):
            yield need(False, found.reason, found.node)

    def replace(self, match: Match, build: Builder) -> Replacement:
        found = analyse(match)
        if found is None or isinstance(found, Refused):
            return None
        return build_experts(build, match.root, _stacked(found, match.program))


@dataclass(frozen=True)
class Expert:
    """One term of the sum: the router's choice, and the projections of the expert (weights and biases of two
    and one dims)."""

    choice: Choice
    hidden: fx.Node
    gate: Gate
    first: Projection
    down: Projection
    up: Projection | None


@dataclass(frozen=True)
class Turns:
    """All terms in the order of their experts, and what they are added to."""

    experts: tuple[Expert, ...]
    base: fx.Node | None


def analyse(match: Match) -> Turns | Refused | None:
    """The terms that end in the match; what refuses them; None where no loop over experts ends."""
    if any(_continues(user, match.root) for user in match.root.users):
        return None  # an inner turn: the last one tells of all
    terms, base = _terms(match.root)
    if len(terms) < 2 or read_choice(*terms[0]) is None:
        return None
    try:
        experts = sorted((_expert(*term) for term in terms), key=lambda expert: expert.choice.number)
        _check(experts, match.root, match.program)
        return Turns(tuple(experts), base)
    except Refused as refused:
        return refused


def _continues(user: fx.Node, node: fx.Node) -> bool:
    turn = _turn(user)
    return turn is not None and turn[0] is node


Term = tuple[fx.Node, fx.Node | None]


def _terms(root: fx.Node) -> tuple[list[Term], fx.Node | None]:
    """The ``(weighted output, rows it is added to)`` of each turn, last first, and what the first is added
    to."""
    terms: list[Term] = []
    node: Any = root
    while True:
        step = _turn(node)
        if step is None or (terms and len(node.users) > (2 if step[2] else 1)):
            break
        node, term, _ = step
        terms.append(term)
        if is_call(node, (aten.mul.Tensor,)) and read_choice(node, None) is not None:
            return [*terms, (node, None)], None
    return terms, None if is_call(node, ZEROS) else node


def _turn(node: Any) -> tuple[Any, Term, bool] | None:
    """``(before, term, whether it reads what was there twice)`` of one turn."""
    if is_call(node, (aten.index_add.default,)):
        given = arguments(node)
        plain = given["dim"] in (0, -2) and given["alpha"] == 1
        return (given["self"], (given["source"], given["index"]), False) if plain else None
    if is_call(node, (aten.index_put.default,)) and len(node.args[1]) == 1 and not arguments(node)["accumulate"]:
        before, rows, value = node.args[0], node.args[1][0], node.args[2]
        if is_call(value, (aten.add.Tensor,)):
            for there, term in (value.args[:2], value.args[1::-1]):
                if is_call(there, (aten.index.Tensor,)) and there.args[0] is before and list(there.args[1]) == [rows]:
                    return before, (term, rows), True
        return None
    if is_call(node, (aten.add.Tensor,)) and arguments(node)["alpha"] == 1:
        for before, term in (node.args[:2], node.args[1::-1]):
            if is_tensor(before) and is_tensor(term) and read_choice(term, None) is not None:
                return before, (term, None), False
    return None


def _expert(term: fx.Node, rows: fx.Node | None) -> Expert:
    choice = read_choice(term, rows)
    if choice is None:
        raise Refused("a term of the sum over experts is not weighted by the router", term)
    inner, down = _linear(choice.output)
    gate = read_gate(float_source(inner))
    source, first = _linear(float_source(gate.first))
    up: Projection | None = None
    if gate.up is not None:
        up_source, up = _linear(float_source(gate.up))
        if up_source is not source:
            raise Refused("gate and up are projections of different inputs", gate.up)
    return Expert(choice, choice.tokens(source), gate, first, down, up)


def _linear(node: Any) -> tuple[fx.Node, Projection]:
    """``(input, projection)`` of a linear layer."""
    bias: Any = None
    if is_call(node, (aten.add.Tensor,)) and rank(node.args[1]) == 1:
        node, bias = node.args[:2]
    if is_call(node, (aten.linear.default,)):
        given = arguments(node)
        source, weight, bias = given["input"], given["weight"], given["bias"] if bias is None else bias
        return source, Projection(source, weight, bias, False)
    if is_call(node, (aten.matmul.default,)) and rank(node.args[1]) == 2:
        source, weight = node.args
        turned = is_call(weight, (aten.permute.default,))
        return source, Projection(source, weight.args[0] if turned else weight, bias, not turned)
    raise Refused("an expert is not made of linear layers", node)


def _check(experts: list[Expert], root: fx.Node, program: Program) -> None:
    one = experts[0]
    if [expert.choice.number for expert in experts] != list(range(len(experts))):
        raise Refused("the terms are not one for each expert, counted from zero", root)
    for other in experts[1:]:
        if other.choice.index is not one.choice.index or other.choice.weight is not one.choice.weight:
            raise Refused("the experts are weighted by different routers", other.choice.output)
        if other.hidden is not one.hidden:
            raise Refused("the experts run on different inputs", other.choice.output)
        if _form(other) != _form(one):
            raise Refused("the experts compute different functions", other.choice.output)
    if rank(one.hidden) != 2 or not size_equal(shape(root)[0], shape(one.hidden)[0]) or rank(one.choice.index) != 2:
        raise Refused("the experts do not run on rows of tokens", root)
    for parts in _parts(experts):
        _common(parts, program)


def _form(expert: Expert) -> tuple[Any, ...]:
    gate, projections = expert.gate, (expert.first, expert.down, expert.up)
    stored = tuple(p and (p.transposed, p.bias is None, shape(p.weight)) for p in projections)
    return gate.activation, gate.layout, gate.alpha, gate.limit, gate.up_offset, stored


def _parts(experts: list[Expert]) -> Iterator[list[fx.Node]]:
    """Each weight and each bias, of all experts."""
    for projections in zip(*((e.first, e.down, e.up) for e in experts), strict=True):
        for name in ("weight", "bias"):
            parts = [getattr(projection, name) for projection in projections if projection is not None]
            if parts and parts[0] is not None:
                yield parts


def _common(parts: list[fx.Node], program: Program) -> fx.Node | None:
    """The stacked tensor that the parts are the entries of, None where they are weights of their own."""
    if all(is_call(part, (aten.select.int,)) for part in parts):
        whole = parts[0].args[0]
        entries = [(part.args[0], part.args[1], part.args[2]) for part in parts]
        wanted = [(whole, -len(shape(parts[0])) - 1, number) for number in range(len(parts))]
        if isinstance(whole, fx.Node) and shape(whole)[0] == len(parts) and entries == wanted:
            return whole
    if any(program.weight_name(part) is None for part in parts):
        raise Refused("the weights of an expert are computed", parts[0])
    return None


def _stacked(turns: Turns, program: Program) -> Experts:
    experts = list(turns.experts)
    one = experts[0]
    transposed = one.down.transposed

    def stack(name: str) -> Projection | None:
        projections = [getattr(expert, name) for expert in experts]
        if projections[0] is None:
            return None
        bias = [p.bias for p in projections]
        weight = _stack([p.weight for p in projections], program, projections[0].transposed != transposed)
        return Projection(one.hidden, weight, None if bias[0] is None else _stack(bias, program), transposed)

    first, down = stack("first"), stack("down")
    assert first is not None and down is not None
    top_k = int(shape(one.choice.index)[-1])
    choice = one.choice
    return Experts(one.hidden, choice.index, choice.weight, top_k, one.gate, first, down, stack("up"), base=turns.base)


def _stack(parts: list[fx.Node], program: Program, turned: bool = False) -> fx.Node:
    """One tensor of all experts' parts; ``turned`` swaps the last two dims."""
    whole = _common(parts, program)
    if whole is not None and not turned:
        return whole
    names = tuple(str(program.weight_name(part)) for part in (parts if whole is None else [whole]))
    if whole is None:
        joined = program.weights.derive(f"{names[0]}.joined", WeightOp("concat", names, {"dim": 0}))
        sizes = [len(parts), *(int(size) for size in shape(parts[0]))]
        stacked = WeightOp("reshape", (joined,), {"shape": sizes})
        if not turned:
            return program.derive_weight(f"{names[0]}.stacked", stacked)
        names = (program.weights.derive(f"{names[0]}.stacked", stacked),)
    return program.derive_weight(f"{names[0]}.turned", WeightOp("permute", names, {"dims": [0, 2, 1]}))
