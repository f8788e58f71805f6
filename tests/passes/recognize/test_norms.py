"""RMSNorm and LayerNorm are found in every spelling, with the element types of their flavour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.ir import ops
from regraft.ir.nodes import arguments
from regraft.ir.program import Program
from regraft.passes.recognize import rms_norm_examples as written
from regraft.passes.recognize.layer_norm import RecognizeLayerNorm
from regraft.passes.recognize.layer_norm_examples import normalized
from regraft.passes.recognize.rms_norm import RecognizeRmsNorm
from regraft.passes.recognize.rms_norm_call import RecognizeRmsNormCall
from regraft.passes.recognize.rms_norm_length import RecognizeRmsNormByLength
from tests.support import apply, captured, run

aten = torch.ops.aten
RULES = (RecognizeLayerNorm(), RecognizeRmsNormCall(), RecognizeRmsNormByLength(), RecognizeRmsNorm())


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 16, generator=generator).to(dtype), torch.rand(16, generator=generator).to(dtype)


def rewritten(function: Callable[..., Any], args: tuple[Tensor, ...]) -> Program:
    program = captured(function, args)
    apply(program, RULES)
    return program


def calls(program: Program, target: Any) -> list[dict[str, Any]]:
    """Arguments of each call of ``target``."""
    return [arguments(node) for node in program.graph.nodes if node.target is target]


def test_rms_norm_reference_is_the_formula() -> None:
    x, weight = tensors(torch.float64)
    expected = x / (x.pow(2).sum(-1, keepdim=True) / 16 + 1e-6).sqrt() * (weight + 1)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6, 1.0, "after_weight"), expected)


@pytest.mark.parametrize("flavour", [written.llama, written.t5, written.gemma, written.olmo], ids=lambda f: f.__name__)
def test_flavour_keeps_every_bit_in_bf16(flavour: Callable[..., Tensor]) -> None:
    args = tensors(torch.bfloat16)
    program = rewritten(flavour, args)
    assert len(calls(program, ops.rms_norm)) == 1
    assert torch.equal(run(program, args), flavour(*args))


@pytest.mark.parametrize(
    ("flavour", "offset", "cast"),
    [
        (written.llama, 0.0, "before_weight"),
        (written.gemma, 1.0, "after_weight"),
        (written.olmo, 0.0, "after_weight"),
    ],
)
def test_flavour_is_read_from_the_casts(flavour: Callable[..., Tensor], offset: float, cast: str) -> None:
    (call,) = calls(rewritten(flavour, tensors(torch.bfloat16)), ops.rms_norm)
    assert (call["offset"], call["cast"]) == (offset, cast)


def test_scale_that_is_no_vector_stays_outside_the_norm() -> None:
    x, _ = tensors()
    scale = torch.rand(2, 1, 16)
    program = rewritten(lambda x, scale: x * written.inverse_root(x) * scale, (x, scale))
    (call,) = calls(program, ops.rms_norm)
    assert call["weight"] is None
    assert len(calls(program, aten.mul.Tensor)) == 1


def test_weight_stays_outside_where_the_normalised_value_is_used_too() -> None:
    def twice(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        normed = x * written.inverse_root(x)
        return normed * weight, normed

    (call,) = calls(rewritten(twice, tensors()), ops.rms_norm)
    assert call["weight"] is None


def test_result_cast_to_another_type_than_the_input_keeps_its_cast() -> None:
    program = rewritten(lambda x, w: (x * written.inverse_root(x)).bfloat16() * w.bfloat16(), tensors())
    (call,) = calls(program, ops.rms_norm)
    assert call["x"].meta["val"].dtype == torch.float32


def test_norm_of_each_head_is_found_in_either_layout() -> None:
    def heads(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        query = x.view(2, 3, 1, 16)
        return written.llama(query, weight), written.llama(query.transpose(1, 2) + 1, weight)

    assert len(calls(rewritten(heads, tensors()), ops.rms_norm)) == 2


def test_layer_norm_is_not_taken_for_the_rms_norm_of_a_centered_tensor() -> None:
    program = rewritten(lambda x, w: normalized(x) * w, tensors())
    assert len(calls(program, aten.layer_norm.default)) == 1
    assert not calls(program, ops.rms_norm)


def test_layer_norm_rounded_before_its_weight_keeps_the_product_outside() -> None:
    def rounded_first(x: Tensor, weight: Tensor) -> Tensor:
        return normalized(x.float()).to(x.dtype) * weight

    args = tensors(torch.bfloat16)
    program = rewritten(rounded_first, args)
    (call,) = calls(program, aten.layer_norm.default)
    assert call["weight"] is None
    torch.testing.assert_close(run(program, args), rounded_first(*args))


def test_norm_with_a_symbolic_batch() -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = captured(written.llama, tensors(), dynamic={"args": ({0: batch}, None)})
    apply(program, RULES)
    assert len(calls(program, ops.rms_norm)) == 1


def test_refusal_names_the_line_of_the_source() -> None:
    program = captured(lambda x, w: x * written.inverse_root(x, 1) * w, tensors())
    session = apply(program, RULES)
    (refusal,) = session.log.refusals
    assert refusal.reason == "the mean is not over the last dimension"
    assert "rms_norm_examples.py" in refusal.user_line


def test_a_row_scaled_to_the_root_of_its_size_is_normed_and_a_row_of_zeros_is_nan() -> None:
    x, _ = tensors()
    x[0, 1] = 0.0

    def by_length(x: Tensor) -> Tensor:
        return x / x.norm(2, -1, keepdim=True) * 4

    program = rewritten(by_length, (x,))
    assert [call["eps"] for call in calls(program, ops.rms_norm)] == [0.0]
    torch.testing.assert_close(run(program, (x,)), by_length(x), equal_nan=True)


def test_lengths_that_low_precision_rounds_stay() -> None:
    x, _ = tensors(torch.bfloat16)
    assert not calls(rewritten(lambda x: x / x.norm(2, -1, keepdim=True) * 4, (x,)), ops.rms_norm)
