"""What experts leave in a graph: facts about their counts that hold by themselves, and products that no rule read."""

from __future__ import annotations

import math
import operator
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from regraft.ir.driver import Session
from regraft.ir.nodes import is_call, is_tensor, rank, shape, size_equal, user_line
from regraft.ir.program import Program
from regraft.ir.records import Refusal
from regraft.passes.base import Pass
from regraft.passes.recognize.moe import RecognizeMoe
from regraft.passes.recognize.moe_pieces import entries_of
from regraft.passes.recognize.moe_products import GROUPED
from regraft.passes.recognize.moe_rows import counted_ids, picked

aten = torch.ops.aten

_ITEMS = (aten.item.default, aten._local_scalar_dense.default)


@dataclass(frozen=True)
class DropCountChecks(Pass):
    """Remove what export asserts of the experts' counts of pairs: each is at least zero and at most the number of
    pairs, and together they are that number. This is so for any router."""

    def run(self, program: Program, session: Session) -> int:
        removed = 0
        for node in list(program.graph.nodes):
            if is_call(node, (aten._assert_scalar.default,)) and _always_holds(node.args[0]):
                program.graph.erase_node(node)
                removed += 1
        return removed


def _always_holds(fact: Any) -> bool:
    if not is_call(fact, (operator.ge, operator.le, operator.eq)):
        return False
    terms = list(_terms(fact.args[0]))
    bound = fact.args[1]
    if not all(is_call(term, _ITEMS) and is_call(term.args[0], (aten.select.int,)) for term in terms):
        return False
    counts: Any = terms[0].args[0].args[0]
    flat = counted_ids(counts, shape(counts)[0]) if rank(counts) == 1 else None
    if flat is None:
        return False
    if fact.target is operator.ge:
        return len(terms) == 1 and isinstance(bound, int) and bound <= 0
    pairs = math.prod(shape(flat))
    if fact.target is operator.le:
        return len(terms) == 1 and size_equal(bound, pairs)
    return entries_of(terms) is counts and size_equal(bound, pairs)


def _terms(total: Any) -> Iterator[Any]:
    if is_call(total, (operator.add,)):
        yield from _terms(total.args[0])
        total = total.args[1]
    yield total


@dataclass(frozen=True)
class ReportLeftExperts(Pass):
    """Refuse, for the report, products by chosen experts that are left and that no rule gave a reason for: those of a
    grouped product, with gathered matrices, or of several sets of rows that the data choose. Changes nothing."""

    def run(self, program: Program, session: Session) -> int:
        by_name = {node.name: node for node in program.graph.nodes}
        refused = {refusal.node for refusal in session.log.refusals if refusal.recognizes == "moe"}
        known = {_chooser(by_name[name]) for name in refused if name in by_name}
        left: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in program.graph.nodes:
            if _is_product(node):
                left[_chooser(node)].append(node)
        for chooser, products in left.items():
            if chooser not in known and _by_experts(products):
                session.log.refusals.append(_refusal(self.name, products[-1]))
        return 0


def _refusal(pass_name: str, product: fx.Node) -> Refusal:
    reason = "no sum over the experts of each token ends the products by chosen experts"
    return Refusal(RecognizeMoe().name, pass_name, "pattern", product.name, reason, user_line(product), "moe")


def _is_product(node: fx.Node) -> bool:
    """A product that the data may have chosen the rows or the matrices of."""
    if node.op != "call_function" or not is_tensor(node):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.name in GROUPED:
        return True
    return is_call(node, (aten.linear.default, aten.matmul.default)) and bool(_gathers(node) or _row_symbols(node))


def _by_experts(products: list[fx.Node]) -> bool:
    """One set of rows that the data choose is no sign of experts; several are."""
    symbols = {symbol for product in products for symbol in _row_symbols(product)}
    return len(symbols) > 1 or any(not _row_symbols(product) or _gathers(product) for product in products)


def _row_symbols(product: fx.Node) -> set[Any]:
    return {symbol for size in shape(product)[:-1] for symbol in free_unbacked_symbols(size)}


def _gathers(product: fx.Node) -> bool:
    """Whether a matrix of each row is picked from a table of them."""
    for operand in product.all_input_nodes:
        source: Any = operand.args[0] if is_call(operand, (aten.permute.default,)) else operand
        pick = picked(source)
        if pick is not None and rank(pick[0]) == 3 and isinstance(pick[1], fx.Node):
            return True
    return False


def _chooser(node: fx.Node) -> fx.Node:
    """The nearest node behind ``node`` that makes numbers or truth values of floating-point ones; itself if none."""
    seen, pending = {node}, deque([node])
    while pending:
        one = pending.popleft()
        if is_tensor(one) and not one.meta["val"].is_floating_point() and _reads_floats(one):
            return one.args[0] if is_call(one, (operator.getitem,)) else one  # type: ignore[return-value]
        for source in one.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return node


def _reads_floats(node: fx.Node) -> bool:
    if is_call(node, (operator.getitem,)):
        node = node.args[0]  # type: ignore[assignment]
    inputs = [source for source in node.all_input_nodes if is_tensor(source)]
    cast = is_call(node, (aten.to.dtype,))  # of numbers that stay numbers
    return not cast and any(source.meta["val"].is_floating_point() for source in inputs)
