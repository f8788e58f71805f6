"""Verification of one rewrite: what is accepted at which exactness, and what varied inputs find out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder
from regraft.ir.program import Program
from regraft.ir.verify import Verdict, Verifier, check_shapes, relative_l2
from tests.ir.graphs import numbers, program_of, root_of

aten = torch.ops.aten
X = numbers(4, 8)
NAN, INF = math.nan, math.inf

Rewrite = Callable[[Builder, Program], fx.Node]


def verdict(
    function: Callable[..., Any],
    args: tuple[Tensor, ...],
    rewrite: Rewrite,
    exactness: Exactness = Exactness.REASSOCIATED,
    against_fp64: bool = False,
) -> Verdict:
    """The verdict on replacing the output of ``function`` by what ``rewrite`` builds."""
    program = program_of(function, *args)
    build = Builder(program.graph, program.output_node, program.fake_mode)
    new = rewrite(build, program)
    return Verifier(program).check({root_of(program): new}, build.made, exactness, against_fp64)


@pytest.mark.parametrize(
    ("value", "reference", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.5], [0.0], 0.5),
        ([NAN, 1.0], [NAN, 1.0], 0.0),
        ([NAN, 2.0], [NAN, 1.0], 1.0),
        ([INF, 1.0], [INF, 1.0], 0.0),
        ([NAN, 1.0], [0.0, 1.0], INF),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([[1.0]], [1.0], INF),
    ],
)
def test_relative_l2(value: Any, reference: Any, expected: float) -> None:
    assert relative_l2(torch.tensor(value), torch.tensor(reference)) == pytest.approx(expected)


def test_both_parts_of_complex_numbers_count() -> None:
    reference = torch.tensor([3 + 4j, 0j])
    assert relative_l2(torch.tensor([3 + 4.5j, 0j]), reference) == pytest.approx(0.1)
    assert relative_l2(reference.conj(), reference) == pytest.approx(1.6)


def test_integers_agree_or_do_not() -> None:
    assert relative_l2(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0.0
    assert relative_l2(torch.tensor([1, 2]), torch.tensor([1, 3])) == INF


def test_same_tensor_with_nan_agrees_with_itself() -> None:
    value = torch.tensor([NAN])
    assert relative_l2(value, value) == 0.0


def test_shapes_and_types_must_stay() -> None:
    program = program_of(lambda x: (x, x.double(), x.amax(0), x.sum()), X)
    kinds = (aten.to.dtype, aten.amax.default, aten.sum.default)
    (x,) = program.user_inputs()
    wide, row, total = (next(n for n in program.graph.nodes if n.target is kind) for kind in kinds)
    assert check_shapes(x, x) == ""
    assert check_shapes(x, wide) == "element type changes from torch.float32 to torch.float64"
    assert check_shapes(x, row) == "shape changes from [4, 8] to [8]"
    assert "shape changes" in check_shapes(row, total)
    assert "same kind of value" in check_shapes(x, program.output_node)


def reversed_sum(build: Builder, program: Program) -> fx.Node:
    """The mean as a matrix product: other order of additions."""
    (x,) = program.user_inputs()
    ones = build.call(aten.full_like.default, build.call(aten.slice.Tensor, x, 0, 0, 1), 1.0)
    product = build.call(aten.matmul.default, x, build.call(aten.permute.default, ones, [1, 0]))
    return build.call(aten.reshape.default, product, [4])


def test_reassociation_is_accepted_and_its_drift_measured() -> None:
    result = verdict(lambda x: x.sum(-1), (numbers(4, 512),), reversed_sum)
    assert result.accepted and result.drift is not None and 0 < result.drift < 5e-6


def test_bitwise_means_the_same_bits() -> None:
    result = verdict(lambda x: x.sum(-1), (numbers(4, 512),), reversed_sum, Exactness.BITWISE)
    assert not result.accepted and result.reason.startswith("declared bitwise, but changes the result by")


def test_lossy_is_accepted_with_its_drift() -> None:
    result = verdict(
        lambda x: x.relu(), (X,), lambda b, p: b.call(aten.abs.default, p.user_inputs()[0]), Exactness.LOSSY
    )
    assert result.accepted and result.drift is not None and result.drift > 0.1


def test_wrong_numbers_are_refused_with_both_errors() -> None:
    result = verdict(lambda x: x.relu(), (X,), lambda b, p: b.call(aten.abs.default, p.user_inputs()[0]))
    assert not result.accepted
    assert "against fp64, the original has 0.0e+00" in result.reason


def in_bf16(x: Tensor) -> Tensor:
    """A sum rounded to bf16 after each step: the original itself is far from fp64."""
    total = x[:, 0]
    for column in range(1, x.shape[1]):
        total = total + x[:, column]
    return total


def test_better_than_the_original_is_accepted_although_it_differs() -> None:
    x = torch.ones(4, 16, dtype=torch.bfloat16)
    x[:, 0] = 256  # in bf16, 256 + 1 is 256
    result = verdict(in_bf16, (x,), lambda b, p: b.call(aten.sum.dim_IntList, p.user_inputs()[0], [-1]))
    assert result.accepted
    assert result.drift is not None and result.drift > 1e-2  # beyond bf16's own tolerance
    assert result.drift_fp64 is not None and result.original_fp64 is not None
    assert result.drift_fp64 < result.original_fp64


def test_worse_than_the_original_is_refused_in_bf16() -> None:
    x = numbers(4, 64, dtype=torch.bfloat16)

    def shifted(build: Builder, program: Program) -> fx.Node:
        wide = build.call(aten.sum.dim_IntList, program.user_inputs()[0], [-1])
        return build.call(aten.mul.Tensor, wide, 1.05)

    result = verdict(lambda x: x.sum(-1), (x,), shifted)
    assert not result.accepted and "against fp64" in result.reason


def test_fp64_is_measured_where_the_rule_asks() -> None:
    def wide_sum(build: Builder, program: Program) -> fx.Node:
        return build.call(aten.sum.dim_IntList, program.user_inputs()[0], [-1])

    result = verdict(lambda x: x.sum(-1), (X,), wide_sum, against_fp64=True)
    assert result.accepted and result.drift == 0.0
    assert result.drift_fp64 is not None and result.drift_fp64 == result.original_fp64


def masked(x: Tensor, mask: Tensor) -> Tensor:
    return x.tanh().masked_fill(mask == 0, 0.0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_right_on_the_examples_mask_only_is_refused(dtype: torch.dtype) -> None:
    ones = torch.ones(4, 8, dtype=dtype)

    def forget_the_mask(build: Builder, program: Program) -> fx.Node:
        return build.call(aten.tanh.default, program.user_inputs()[0])

    assert not verdict(masked, (X, ones), forget_the_mask).accepted


def test_right_on_the_examples_positions_only_is_refused() -> None:
    def gathered(x: Tensor, ids: Tensor) -> Tensor:
        return x.tanh().index_select(0, ids)

    def forget_the_order(build: Builder, program: Program) -> fx.Node:
        return build.call(aten.tanh.default, program.user_inputs()[0])

    assert not verdict(gathered, (X, torch.arange(4)), forget_the_order).accepted


def test_right_on_every_mask_is_accepted() -> None:
    def as_where(build: Builder, program: Program) -> fx.Node:
        x, mask = program.user_inputs()
        hidden = build.call(aten.eq.Scalar, mask, 0)
        return build.call(aten.where.ScalarSelf, hidden, 0.0, build.call(aten.tanh.default, x))

    assert verdict(masked, (X, torch.ones(4, 8, dtype=torch.bool)), as_where, Exactness.BITWISE).accepted


def test_rows_that_are_not_a_number_must_stay_so() -> None:
    def softmax_of_nothing(x: Tensor) -> Tensor:
        return torch.full_like(x, -INF).softmax(-1)

    def zeros(build: Builder, program: Program) -> fx.Node:
        return build.call(aten.zeros_like.default, program.user_inputs()[0])

    result = verdict(softmax_of_nothing, (X,), zeros)
    assert not result.accepted


def test_what_a_rule_built_and_does_not_use_is_not_asked_for() -> None:
    """Its operand lies inside of what is replaced: a random value there would cut the old nodes apart."""

    def rewrite(build: Builder, program: Program) -> fx.Node:
        (x,) = program.user_inputs()
        build.call(aten.neg.default, next(iter(x.users)))
        return build.call(aten.cos.default, build.call(aten.sin.default, x))

    assert verdict(lambda x: x.sin().cos(), (X,), rewrite, Exactness.BITWISE).accepted
