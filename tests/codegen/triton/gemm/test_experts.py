"""Kernels of routed experts, interpreted, beside the definition of ``regraft::moe`` in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.triton.gemm.experts import emit_experts
from regraft.codegen.triton.gemm.experts_spec import ExpertsSpec, experts_spec
from regraft.codegen.triton.load import load_kernel
from regraft.ir import ops
from regraft.ir.ops.moe import LAYOUTS
from regraft.ir.ops.moe import reference as definition
from tests.codegen.rowwise.support import agree
from tests.codegen.triton.interpreted import Run
from tests.support import captured

FULL, HALF = torch.float32, torch.float16
TILES = (16, 16, 16, 4, 1)
SPEC = ExpertsSpec(FULL, FULL, experts=5, hidden=24, intermediate=20)


def operands(spec: ExpertsSpec, tokens: int, top_k: int, seed: int = 0) -> dict[str, Any]:
    """Tokens, distinct experts for each, and weights of a spec's shapes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) / 2).to(spec.dtype)

    scores = torch.rand(tokens, spec.experts, generator=generator)
    weight, index = scores.topk(top_k)
    given = {"hidden": draw(tokens, spec.hidden), "index": index, "weight": weight.to(spec.routing)}
    return given | {name: draw(*spec.sizes(name)) for name in spec.operands[3:]}


def compare(run: Run, spec: ExpertsSpec, given: dict[str, Any]) -> None:
    """The kernels and the operator on the CPU beside the definition."""
    kernel = emit_experts(spec)
    options = {name: getattr(spec, name) for name in ("activation", "layout", "transposed", "alpha", "limit")}
    options["up_offset"] = spec.up_offset
    wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    exact, usual = definition(**wide, **options), definition(**given, **options)
    made = run(kernel, given, config=TILES)
    own = load_kernel(kernel).operator(*(given[name] for name in kernel.operands))
    for result in (made, own):
        assert result.dtype == usual.dtype and result.shape == usual.shape
        agree(result, exact, usual)


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_weights(run: Run, layout: str, dtype: torch.dtype) -> None:
    spec = replace(SPEC, dtype=dtype, routing=dtype, layout=layout)
    compare(run, spec, operands(spec, 13, 2))


@pytest.mark.parametrize("transposed", [False, True])
def test_biases(run: Run, transposed: bool) -> None:
    for layout in ("interleaved", "separate"):
        spec = replace(SPEC, layout=layout, first_bias=True, down_bias=True, transposed=transposed)
        compare(
            run,
            replace(spec, up_bias=layout == "separate"),
            operands(replace(spec, up_bias=layout == "separate"), 9, 2),
        )


def test_the_gate_of_gpt_oss(run: Run) -> None:
    """Swish with a factor, both parts clamped, one added to the value."""
    spec = replace(SPEC, layout="interleaved", activation="swish", alpha=1.702, limit=0.5, up_offset=1.0)
    compare(run, spec, operands(spec, 9, 3))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu_squared", "none"])
def test_activations(run: Run, activation: str) -> None:
    for layout in ("gate_up", "single"):
        spec = replace(SPEC, activation=activation, layout=layout)
        compare(run, spec, operands(spec, 7, 2))


def test_routing_weights_in_fp32_over_tokens_in_fp16(run: Run) -> None:
    spec = replace(SPEC, dtype=HALF)
    compare(run, spec, operands(spec, 9, 2))


def test_experts_without_tokens_and_one_with_all(run: Run) -> None:
    given_tensors = operands(SPEC, 40, 1)
    given_tensors["index"] = torch.full((40, 1), 3)
    compare(run, SPEC, given_tensors)


def test_pairs_of_other_experts_add_nothing(run: Run) -> None:
    """A shard's index is shifted by its first expert: what lies outside belongs to others."""
    given_tensors = operands(SPEC, 17, 3)
    given_tensors["index"] = given_tensors["index"] - 2
    given_tensors["index"][3] = torch.tensor([-1, 7, 99])
    compare(run, SPEC, given_tensors)


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 9),
    hidden=st.integers(2, 40),
    intermediate=st.integers(2, 40),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_size(run: Run, tokens: int, experts: int, hidden: int, intermediate: int, seed: int, data: Any) -> None:
    spec = replace(SPEC, experts=experts, hidden=hidden, intermediate=intermediate)
    compare(run, spec, operands(spec, tokens, data.draw(st.integers(1, experts)), seed))


def test_any_strides(run: Run) -> None:
    given_tensors = operands(SPEC, 9, 2)
    given_tensors["hidden"] = operands(replace(SPEC, hidden=48), 9, 2)["hidden"][:, ::2]
    given_tensors["down"] = given_tensors["down"].transpose(1, 2).contiguous().transpose(1, 2)
    given_tensors["index"] = given_tensors["index"].t().contiguous().t()
    compare(run, SPEC, given_tensors)


def test_the_operator() -> None:
    kernel = emit_experts(SPEC)
    given_tensors = operands(SPEC, 9, 2)
    torch.library.opcheck(
        load_kernel(kernel).operator._opoverload, tuple(given_tensors[name] for name in kernel.operands)
    )


def test_a_wrong_operand_is_refused() -> None:
    launch = load_kernel(emit_experts(SPEC)).launch
    given_tensors = operands(SPEC, 9, 2)
    with pytest.raises(ValueError, match="whole numbers"):
        launch(**given_tensors | {"index": given_tensors["weight"]})
    with pytest.raises(ValueError, match="down is"):
        launch(**given_tensors | {"down": given_tensors["down"][:, :7]})


def test_a_site_gives_its_spec_or_a_reason() -> None:
    def model(hidden: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor) -> Tensor:
        return ops.moe(hidden, index, weight, first, down, activation="gelu")

    given_tensors = operands(SPEC, 9, 2)
    program = captured(model, tuple(given_tensors.values()))
    (node,) = (node for node in program.graph.nodes if node.target is ops.moe)
    assert experts_spec(node) == replace(SPEC, activation="gelu")
    given_tensors["down"] = given_tensors["down"].half()
    mixed = captured(model, tuple(given_tensors.values()))
    (node,) = (node for node in mixed.graph.nodes if node.target is ops.moe)
    with pytest.raises(Unfusable, match="tokens and weights are"):
        experts_spec(node)
