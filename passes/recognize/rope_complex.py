"""Recognise rotary position embedding as a product of complex numbers (the original Llama code)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from regraft.ir import ops
from regraft.ir.nodes import Builder, dtype, rank, shape, size_equal, sizes_equal, tensor_value
from regraft.ir.pattern import anything, mul, operator, reshape
from regraft.ir.rule import Example, Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize.pairs import flat_pairs

aten = torch.ops.aten
as_complex = operator(aten.view_as_complex.default)
as_real = operator(aten.view_as_real.default)


class RecognizeRopeComplex(Rule):
    """Neighbours are read as a complex number and turned by ``cos + i sin``."""

    recognizes = "rope"
    landmark = "number"

    def pattern(self, pairs: Any, turn: Any) -> Any:
        product = mul(as_complex(pairs).named("number"), turn).named("product")
        return reshape(as_real(product), anything()).named("written")

    def check(self, match: Match) -> Iterator[Requirement]:
        half = shape(match.pairs)[-2]
        table = rank(match.turn) > 0 and size_equal(shape(match.turn)[-1], half)
        yield need(table, "the table does not have one value for each pair", match.turn)
        yield need(dtype(match.turn).is_complex, "the pairs are stretched by real numbers, not turned", match.turn)
        same = sizes_equal(shape(match.product), shape(match.number))
        yield need(same, "the rotation changes the shape", match.turn)
        flat = size_equal(shape(match.written)[-1], half * 2)
        yield need(flat, "the pairs are not written back to one dimension", match.written)

    def replace(self, match: Match, build: Builder) -> Replacement:
        x = flat_pairs(match.pairs, build)
        turn = match.turn  # a conjugate (turned back) is a view that must be written out
        turn = build.call(aten.resolve_conj.default, turn) if tensor_value(turn).is_conj() else turn
        table = build.call(aten.view_as_real.default, turn)
        cos, sin = (build.call(aten.select.int, table, -1, part) for part in (0, 1))
        result = build.call(ops.rope, x, cos, sin, shape(match.pairs)[-2] * 2, "interleaved")
        if sizes_equal(shape(result), shape(match.root)):
            return result
        return build.call(aten.reshape.default, result, match.root.args[1])


def _example(name: str, table: int, reason: str = "", real: bool = False, back: bool = False) -> Example:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        turn = torch.complex(cos, sin)
        return torch.view_as_real(pairs * (cos if real else turn.conj() if back else turn)).flatten(3)

    def make() -> tuple[Any, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        angles = torch.rand(5, 1, table, generator=generator)
        return rotate, (torch.randn(2, 5, 3, 8, generator=generator), angles.cos(), angles.sin())

    return Example(name, make, reason)


RecognizeRopeComplex.examples = (_example("llama", 4), _example("turned back", 4, back=True))
RecognizeRopeComplex.near_misses = (
    _example("one value a row", 1, "the table does not have one value for each pair"),
    _example("real numbers", 4, "the pairs are stretched by real numbers", real=True),
)
