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
from regraft.passes.recognize import moe_loop_examples as shown
from regraft.passes.recognize.moe_experts import Experts, Refused
from regraft.passes.recognize.moe_rows import ZEROS
from regraft.passes.recognize.moe_turns import Choice, read_choice
from regraft.passes.recognize.moe_weights import OneExpert, emit, join_experts, read_expert

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
        return emit(build, match.root, found, match.program)


@dataclass(frozen=True)
class Expert:
    """One term of the sum: the router's choice, and what the expert computes."""

    choice: Choice
    hidden: fx.Node
    computed: OneExpert


def analyse(match: Match) -> Experts | Refused | None:
    """The terms that end in the match; what refuses them; None where no loop over experts ends."""
    if any(_continues(user, match.root) for user in match.root.users):
        return None  # an inner turn: the last one tells of all
    terms, base = _terms(match.root)
    if len(terms) < 2 or read_choice(*terms[0]) is None:
        return None
    try:
        experts = sorted((_expert(*term) for term in terms), key=lambda expert: expert.choice.number)
        _check(experts, match.root)
        return _joined(experts, match.program, base)
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
    computed = read_expert(choice.output)
    return Expert(choice, choice.tokens(computed.rows), computed)


def _check(experts: list[Expert], root: fx.Node) -> None:
    one = experts[0]
    if [expert.choice.number for expert in experts] != list(range(len(experts))):
        raise Refused("the terms are not one for each expert, counted from zero", root)
    for other in experts[1:]:
        if other.choice.index is not one.choice.index or other.choice.weight is not one.choice.weight:
            raise Refused("the experts are weighted by different routers", other.choice.output)
        if other.hidden is not one.hidden:
            raise Refused("the experts run on different inputs", other.choice.output)
    if rank(one.hidden) != 2 or not size_equal(shape(root)[0], shape(one.hidden)[0]) or rank(one.choice.index) != 2:
        raise Refused("the experts do not run on rows of tokens", root)


def _joined(experts: list[Expert], program: Program, base: fx.Node | None) -> Experts:
    one = experts[0]
    first, down, *up = join_experts(one.hidden, [expert.computed for expert in experts], program)
    index, weight = one.choice.index, one.choice.weight
    gate, top_k = one.computed.gate, int(shape(index)[-1])
    return Experts(one.hidden, index, weight, top_k, gate, first, down, up[0] if up else None, base=base)
