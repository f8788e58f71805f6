"""Recognise routed experts written as a loop over the experts, which export unrolls.

Each turn adds ``coefficient * expert(rows)``. Either every expert runs on all tokens and the coefficient is
zero where the router did not choose it, or ``where`` finds the tokens of the expert, and ``index_add`` or an
assignment adds its outputs to their rows. The experts' weights are separate tensors, which are stacked, or
slices of a stacked one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir.nodes import arguments, dtype, is_call, is_tensor, shape, sizes_equal
from regraft.ir.pattern import add, anything, either, operator
from regraft.ir.program import Program
from regraft.ir.rule import Match
from regraft.passes.recognize import moe_loop_examples as shown
from regraft.passes.recognize.moe_experts import Experts, Refused
from regraft.passes.recognize.moe_rows import BLANK, ZEROS
from regraft.passes.recognize.moe_rule import RecognizeExperts
from regraft.passes.recognize.moe_table import WHERE, top_k_of
from regraft.passes.recognize.moe_turns import Choice, read_choice
from regraft.passes.recognize.moe_weights import OneExpert, join_experts, read_expert

aten = torch.ops.aten
index_add = operator(aten.index_add.default)
index_put = operator(aten.index_put.default)


class RecognizeMoeLoop(RecognizeExperts):
    """A sum over experts, one term an expert, weighted by what the router gives it."""

    examples = shown.LOOPS
    near_misses = shown.LOOPS_NEAR_MISSES

    def pattern(self, left: Any, right: Any) -> Any:
        return either(
            index_add(left, anything(), anything(), right),
            index_put(left, anything(), right, anything()),
            add(left, right),
        )

    def read(self, match: Match) -> Experts | None:
        if any(_continues(user, match.root) for user in match.root.users):
            return None  # an inner turn: the last one tells of all
        terms, base, assigned = _terms(match.root)
        if len(terms) < 2 or read_choice(*terms[0]) is None:
            return None
        experts = sorted((_expert(*term) for term in terms), key=lambda expert: expert.choice.number)
        _check(experts, match.root)
        _check_read(match.root)
        if assigned:
            _check_assigned(experts, base, match.root)
        blank = is_call(base, (*ZEROS, *BLANK) if assigned else ZEROS)
        return _joined(experts, match.program, None if blank else base)


@dataclass(frozen=True)
class Expert:
    """One term of the sum: the router's choice, and what the expert computes."""

    choice: Choice
    hidden: fx.Node
    computed: OneExpert


def _continues(user: fx.Node, node: fx.Node) -> bool:
    turn = _turn(user)
    return turn is not None and turn.before is node


Term = tuple[fx.Node, fx.Node | None]


def _terms(root: fx.Node) -> tuple[list[Term], fx.Node | None, bool]:
    """The ``(weighted output, rows it is added to)`` of each turn, last first, what the first is added to, and whether
    the rows are overwritten instead."""
    terms: list[Term] = []
    assigned: set[bool] = set()
    node: Any = root
    while True:
        step = _turn(node)
        if step is None or (terms and len(node.users) > (2 if step.way == "read" else 1)):
            break
        assigned.add(step.way == "assigned")
        if len(assigned) > 1:
            break
        node = step.before
        terms.append(step.term)
        if is_call(node, (aten.mul.Tensor, *WHERE)) and read_choice(node, None) is not None:
            return [*terms, (node, None)], None, False
    return terms, node, True in assigned


@dataclass(frozen=True)
class _Turn:
    """One turn: what was there before, the term, and how it comes in: "added", "read" where what was there is read a
    second time to be added to, "assigned" where it is overwritten."""

    before: Any
    term: Term
    way: str = "added"


def _turn(node: Any) -> _Turn | None:
    if is_call(node, (aten.index_add.default,)):
        given = arguments(node)
        plain = given["dim"] in (0, -2) and given["alpha"] == 1
        return _Turn(given["self"], (given["source"], given["index"])) if plain else None
    if is_call(node, (aten.index_put.default,)) and len(node.args[1]) == 1:
        before, rows, value = node.args[0], node.args[1][0], node.args[2]
        if arguments(node)["accumulate"]:
            return _Turn(before, (value, rows))
        if is_call(value, (aten.add.Tensor,)):
            for there, term in (value.args[:2], value.args[1::-1]):
                if is_call(there, (aten.index.Tensor,)) and there.args[0] is before and list(there.args[1]) == [rows]:
                    return _Turn(before, (term, rows), "read")
        return _Turn(before, (value, rows), "assigned") if read_choice(value, rows) is not None else None
    if is_call(node, (aten.add.Tensor,)) and arguments(node)["alpha"] == 1:
        for before, term in (node.args[:2], node.args[1::-1]):
            if is_tensor(before) and is_tensor(term) and read_choice(term, None) is not None:
                return _Turn(before, (term, None))
    return None


def _check_read(root: fx.Node) -> None:
    """A mask's rows are counted where they are read: a sum that is read so would be computed for its size alone."""
    step = _turn(root)
    rows = step.term[1] if step is not None and step.way == "read" else None
    if rows is not None and dtype(rows) == torch.bool:
        raise Refused("the sum is read by a mask, and how many rows there are is known from what is read", root)


def _check_assigned(experts: list[Expert], base: fx.Node | None, root: fx.Node) -> None:
    """Rows that are overwritten are a sum where each token has one expert, and nothing was there before."""
    index, hidden = experts[0].choice.index, experts[0].hidden
    if top_k_of(index, shape(hidden)[:-1]) != 1:
        raise Refused("an expert overwrites what another one made of the same tokens", root)
    if not is_call(base, (*ZEROS, *BLANK)):
        raise Refused("experts overwrite some rows of a tensor, others keep what they were", root)


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
        if other.choice.routing != one.choice.routing:
            raise Refused("the experts are weighted by different routers", other.choice.output)
        if other.hidden is not one.hidden:
            raise Refused("the experts run on different inputs", other.choice.output)
    tokens = shape(one.hidden)[:-1]
    if not sizes_equal(shape(root)[:-1], tokens) or top_k_of(one.choice.index, tokens) is None:
        raise Refused("the experts do not run on rows of tokens", root)


def _joined(experts: list[Expert], program: Program, base: fx.Node | None) -> Experts:
    one = experts[0]
    first, down, *up = join_experts(one.hidden, [expert.computed for expert in experts], program)
    index, weight, table = one.choice.routing
    gate, top_k = one.computed.gate, top_k_of(index, shape(one.hidden)[:-1]) or 1
    ends = up[0] if up else None
    return Experts(one.hidden, index, weight, top_k, gate, first, down, ends, base=base, table=table)
