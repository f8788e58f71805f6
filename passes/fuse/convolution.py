"""Folds of convolutions in eval mode: a batch norm beside one becomes its weights, a residual of a depthwise one its
kernel's centre (UniFormer, arXiv:2201.09450)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, dtype, shape
from regraft.ir.pattern import Call, add
from regraft.ir.rule import Example, Match, Replacement, Requirement, Rule, need
from regraft.ir.weights import WeightOp

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


def _norm(*source: Any) -> Call:
    return Call((aten.batch_norm.default,), source, loose=True, name="norm")


def _convolution(*source: Any) -> Call:
    return Call(_CONVOLUTIONS, source, loose=True, name="convolution")


class _Folding(Rule):
    """What both folds of a batch norm share."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def check(self, match: Match) -> Iterator[Requirement]:
        norm, convolution = arguments(match.norm), arguments(match.convolution)
        yield need(not norm["training"], "the norm takes its statistics from the batch", at=match.norm)
        statistics = [norm[name] for name in _STATISTICS]
        yield need(all(map(match.weight_name, statistics)), "the norm's numbers are no weights", at=match.norm)
        weights = [convolution["weight"], *([] if convolution["bias"] is None else [convolution["bias"]])]
        yield need(all(map(match.weight_name, weights)), "the convolution's weights are computed", at=match.convolution)
        mutated = set(match.program.mutated().values())
        names = {match.weight_name(node) for node in (*statistics, *weights)}
        yield need(not names & mutated, "the norm's statistics change while the model runs", at=match.norm)
        yield need(len({dtype(node) for node in (*statistics, *weights)}) == 1, "weights differ in their type")
        inner = "norm" if match.root is match.convolution else "convolution"
        yield need(match.sole_user(inner), f"the {inner}'s output is read elsewhere too", at=match[inner])

    def _folded(self, match: Match, build: Builder, before: bool) -> fx.Node:
        norm, convolution = arguments(match.norm), arguments(match.convolution)
        statistics = tuple(str(match.weight_name(norm[name])) for name in _STATISTICS)
        own = str(match.weight_name(convolution["weight"]))
        bias = () if convolution["bias"] is None else (str(match.weight_name(convolution["bias"])),)
        options = {"eps": norm["eps"], "before": before}
        weight = WeightOp("normed_weight", (own, *statistics), {**options, "groups": convolution["groups"]})
        shift = WeightOp("normed_bias", (own, *statistics, *bias), {**options, "groups": convolution["groups"]})
        given = match.norm.args[0] if before else convolution["input"]
        return build.call(
            match.convolution.target,
            given,
            match.program.derive_weight(f"{own}.normed", weight),
            match.program.derive_weight(f"{own}.shift", shift),
            *(convolution[name] for name in ("stride", "padding", "dilation", "groups")),
        )


class FoldNormIntoNext(_Folding):
    """conv(batch_norm(x)) without padding is one convolution: at a border, padding would not be normed."""

    def pattern(self) -> Any:
        return _convolution(_norm())

    def check(self, match: Match) -> Iterator[Requirement]:
        padding = arguments(match.convolution)["padding"]
        none = isinstance(padding, (list, tuple)) and not any(padding)
        yield need(none, "the convolution pads what is normed with zeros", at=match.convolution)
        yield from super().check(match)

    def replace(self, match: Match, build: Builder) -> Replacement:
        return self._folded(match, build, before=True)

    @staticmethod
    def _example() -> Any:
        return _Normed(first=True), (torch.randn(2, 4, 5, 6),)

    examples = (Example("a norm before a 1x1 convolution", _example),)


class FoldNormIntoLast(_Folding):
    """batch_norm(conv(x)) is one convolution."""

    def pattern(self) -> Any:
        return _norm(_convolution())

    def replace(self, match: Match, build: Builder) -> Replacement:
        return self._folded(match, build, before=False)

    @staticmethod
    def _example() -> Any:
        return _Normed(first=False), (torch.randn(2, 4, 5, 6),)

    examples = (Example("a norm behind a convolution with groups and padding", _example),)


class FoldResidualOfDepthwise(Rule):
    """x + conv(x), depthwise with the shape kept, has one more at the centre of its kernel."""

    exactness = Exactness.REASSOCIATED
    quiet = True

    def pattern(self, x: Any) -> Any:
        return add(x, _convolution(x))

    def check(self, match: Match) -> Iterator[Requirement]:
        given = arguments(match.convolution)
        name = match.weight_name(given["weight"])
        yield need(name is not None, "the kernel is computed", at=match.convolution)
        yield need(name not in set(match.program.mutated().values()), "the kernel changes while the model runs")
        sizes = shape(given["weight"])
        yield need(given["groups"] == sizes[0] and sizes[1] == 1, "the convolution mixes channels")
        yield need(all(step == 1 for step in given["stride"]), "the convolution skips places")
        odd = all(size % 2 == 1 for size in sizes[2:])
        padding = given["padding"]
        reach = [(size - 1) // 2 * gap for size, gap in zip(sizes[2:], _each(given["dilation"], sizes), strict=True)]
        same = not isinstance(padding, str) and _each(padding, sizes) == reach
        yield need(odd and same, "the kernel has no centre that lies on each place")
        yield need(match.sole_user("convolution"), "the convolution is read elsewhere too", at=match.convolution)

    def replace(self, match: Match, build: Builder) -> Replacement:
        given = arguments(match.convolution)
        name = str(match.weight_name(given["weight"]))
        kernel = match.program.derive_weight(f"{name}.residual", WeightOp("with_centre", (name,)))
        return build.call(
            match.convolution.target, match.x, kernel, given["bias"],
            *(given[name] for name in ("stride", "padding", "dilation", "groups")),
        )  # fmt: skip

    @staticmethod
    def _example() -> Any:
        return _Residual(torch.nn.Conv2d(4, 4, 3, padding=1, groups=4)), (torch.randn(2, 4, 5, 6),)

    examples = (Example("a depthwise convolution and its residual", _example),)


def _each(value: Any, sizes: tuple[Any, ...]) -> list[int]:
    """A setting of a convolution for each of its dims."""
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    return found * (len(sizes) - 2) if len(found) == 1 else found


class _Normed(torch.nn.Module):
    """A convolution with a batch norm that has seen data, on one side or the other."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.norm = torch.nn.BatchNorm2d(4 if first else 8)
        self.conv = torch.nn.Conv2d(4, 8, 1) if first else torch.nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False)
        for tensor in (self.norm.running_mean, self.norm.running_var, self.norm.weight.data, self.norm.bias.data):
            assert tensor is not None
            tensor.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.norm(x)) if self.first else self.norm(self.conv(x))
        return out


class _Residual(torch.nn.Module):
    def __init__(self, conv: torch.nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(x)
        return out
