"""``torch.nn.functional.rms_norm`` as the semantic operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from regraft.ir import ops
from regraft.ir.nodes import Builder, dtype
from regraft.ir.pattern import anything, operator
from regraft.ir.rule import Example, Match, Replacement, Requirement, Rule, need

rms_norm_call = operator(torch.ops.aten.rms_norm.default)


class RecognizeRmsNormCall(Rule):
    """PyTorch applies the weight before it rounds; its default eps is that of the type it computes in."""

    recognizes = "rms_norm"
    landmark = "call"

    def pattern(self, x: Any) -> Any:
        return rms_norm_call(x, anything("over"), anything("weight"), anything("eps")).named("call")

    def check(self, match: Match) -> Iterator[Requirement]:
        yield need(len(match.over) == 1, "normalises over more than the last dimension", match.root)

    def replace(self, match: Match, build: Builder) -> Replacement:
        wide = torch.promote_types(dtype(match.x), torch.float32)
        eps = torch.finfo(wide).eps if match.eps is None else match.eps
        return build.call(ops.rms_norm, match.x, match.weight, float(eps), 0.0, "after_weight")


def _example(name: str, sizes: list[int], weighted: bool, eps: float | None, reason: str = "") -> Example:
    def make() -> tuple[Any, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        x, weight = torch.randn(2, 3, 8, generator=generator), torch.rand(sizes, generator=generator)
        return lambda x, w: torch.nn.functional.rms_norm(x, sizes, w if weighted else None, eps), (x, weight)

    return Example(name, make, reason)


RecognizeRmsNormCall.examples = (
    _example("with weight", [8], True, 1e-6),
    _example("default eps", [8], True, None),
    _example("without weight", [8], False, 1e-5),
)
RecognizeRmsNormCall.near_misses = (
    _example("two dimensions", [3, 8], True, 1e-6, "normalises over more than the last dimension"),
)
