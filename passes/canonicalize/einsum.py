"""An einsum is permute, matmul, permute; without an index of its own on a side, of a matrix and a vector."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, dtype, rank
from regraft.ir.pattern import Call
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.canonicalize.identity import identity

aten = torch.ops.aten


@identity(aten.einsum.default, exactness=Exactness.REASSOCIATED)
def einsum_of_two(node: fx.Node, build: Builder) -> fx.Node | None:
    """An einsum of three operands or more contracts the first two, then their result with the others."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    if len(operands) < 3 or "." in equation or equation.count("->") != 1:
        return None
    terms, out = equation.split("->")[0].split(","), equation.split("->")[1]
    read = set(out).union(*terms[2:])
    kept = [label for label in dict.fromkeys(terms[0] + terms[1]) if label in read]
    # what the second operand brings stands last, as matmul leaves it
    between = "".join(
        [label for label in kept if label in terms[0]] + [label for label in kept if label not in terms[0]]
    )
    first = build.call(aten.einsum.default, f"{terms[0]},{terms[1]}->{between}", operands[:2])
    rest = ",".join([between, *terms[2:]])
    return build.call(aten.einsum.default, f"{rest}->{out}", [first, *operands[2:]])


class EinsumIsMatmul(Rule):
    """A two-operand einsum is permute, matmul, permute; indices of one operand only become broadcast batch dims."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self) -> Any:
        return Call((aten.einsum.default,), loose=True)

    def check(self, match: Match) -> Iterator[Requirement]:
        operands = match.root.args[1]
        yield need(isinstance(operands, (list, tuple)) and len(operands) == 2, "einsum does not have two operands")
        yield need(_Einsum.parse(match.root) is not None, "einsum repeats an index or sums one alone")

    def replace(self, match: Match, build: Builder) -> Replacement:
        plan = _Einsum.parse(match.root)
        assert plan is not None
        operands: Any = match.root.args[1]
        left, right = operands
        product = build.call(
            aten.matmul.default,
            _arranged(build, left, plan.left, [*plan.batch, plan.rows, plan.inner]),
            _arranged(build, right, plan.right, [*plan.batch, plan.inner, plan.columns]),
        )
        for dim, label in ((-1, plan.columns), (-2 if plan.columns != _NONE else -1, plan.rows)):
            if label == _NONE:
                product = build.call(aten.squeeze.dim, product, dim)
        have = [label for label in (*plan.batch, plan.rows, plan.columns) if label != _NONE]
        return build.call(aten.permute.default, product, [have.index(label) for label in plan.out])


#: Stands for the rows or columns of an operand that is a vector.
_NONE = "?"


class _Einsum:
    """``out = left, right`` with one contracted index, and one index of each operand as matmul's rows and columns, or
    none."""

    def __init__(self, left: str, right: str, out: str) -> None:
        self.left, self.right, self.out = left, right, out
        self.inner = next(label for label in left if label in right and label not in out)
        self.columns = next((label for label in reversed(out) if label in right and label not in left), _NONE)
        rows = [label for label in out if label in left and label not in right] or [_NONE]
        self.rows = next((label for label in reversed(rows) if self._keeps_operand(label)), rows[-1])
        self.batch = self._batch(self.rows)

    def _batch(self, rows: str) -> list[str]:
        return [label for label in self.out if label not in (rows, self.columns)]

    def _keeps_operand(self, rows: str) -> bool:
        """Whether the left operand of ``weights @ values`` stays as it is: then weights of scores stay scores."""
        return self.right[-1] != self.inner and "".join([*self._batch(rows), rows, self.inner]) == self.left

    @staticmethod
    def parse(node: fx.Node) -> _Einsum | None:
        operands = node.args[1]
        assert isinstance(operands, (list, tuple))
        ranks = [rank(operand) for operand in operands if isinstance(operand, fx.Node)]
        labels = _labels(str(node.args[0]), ranks)
        if labels is None:
            return None
        left, right, out = labels
        shared = [label for label in left if label in right and label not in out]
        alone = [label for label in left + right if label not in out and label not in shared]
        repeated = any(len(set(labels)) != len(labels) for labels in (left, right, out))
        if repeated or alone or len(shared) != 1:
            return None
        return _Einsum(left, right, out)


def _labels(equation: str, ranks: list[int]) -> tuple[str, str, str] | None:
    """The labels of two operands and of the result, with an ellipsis written out; None for any other equation."""
    equation = equation.replace(" ", "").replace("...", ".")
    if equation.count("->") != 1 or equation.count(",") != 1 or len(ranks) != 2:
        return None
    terms = [*equation.split("->")[0].split(","), equation.split("->")[1]]
    unused = [label for label in string.ascii_letters if label not in equation]
    hidden = [max(size - len(term.replace(".", "")), 0) for term, size in zip(terms, ranks, strict=False)]
    most = max(hidden)
    if "." in equation and "." not in terms[2]:
        return None
    counts = [*hidden, most]
    written = (term.replace(".", "".join(unused[most - n : most])) for term, n in zip(terms, counts, strict=True))
    left, right, out = written
    return (left, right, out) if (len(left), len(right)) == tuple(ranks) else None


def _arranged(build: Builder, operand: fx.Node, labels: str, wanted: list[str]) -> fx.Node:
    present = [label for label in wanted if label in labels]
    arranged = build.call(aten.permute.default, operand, [labels.index(label) for label in present])
    for place, label in enumerate(wanted):
        if label not in labels:
            arranged = build.call(aten.unsqueeze.default, arranged, place - (rank(arranged) + 1))
    return arranged


@identity(aten.einsum.default, exactness=Exactness.REASSOCIATED)
def einsum_of_pointwise(node: fx.Node, build: Builder) -> fx.Node | None:
    """An einsum that contracts nothing is a product, one of two vectors for each of a batch a sum of products; in low
    precision that would round the products."""
    operands: Any = node.args[1]
    labels = _labels(str(node.args[0]), [rank(operand) for operand in operands])
    if labels is None or any(len(set(part)) != len(part) for part in labels):
        return None
    left, right, out = labels
    inner = [label for label in left if label not in out]
    if sorted(inner) != sorted(label for label in right if label not in out) or len(inner) > 1:
        return None
    alone = any((label in left) != (label in right) for label in out)
    if inner and (alone or dtype(node) not in (torch.float32, torch.float64)):
        return None
    wanted = [*out, *inner]
    sides = (_arranged(build, side, part, wanted) for side, part in zip(operands, (left, right), strict=True))
    product = build.call(aten.mul.Tensor, *sides)
    return build.call(aten.sum.dim_IntList, product, [-1]) if inner else product


SPELLINGS = (einsum_of_two, einsum_of_pointwise, EinsumIsMatmul())
