"""Routed experts on the CPU equal the operator's definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.codegen.cpu.moe import PackedMoe, pack_moe, run_moe
from regraft.codegen.cpu.native import kernels
from regraft.ir.ops.moe import reference

EXPERTS, HIDDEN, INNER = 3, 8, 6


@pytest.fixture(autouse=True, params=["native", "products"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with the native kernel, which takes fp32 with a SiLU gate, and without it."""
    name = str(request.param)
    if name == "native" and kernels.EXPERTS.missing():
        pytest.skip(kernels.EXPERTS.missing())
    if name == "products":
        monkeypatch.setattr(kernels.EXPERTS, "missing", lambda: "not wanted")
    return name


def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def routed(tokens: int, top_k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, expert index and weights; expert 2 gets no token."""
    index = torch.randint(0, EXPERTS - 1, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))
    return draw(tokens, HIDDEN, dtype=dtype), index, draw(tokens, top_k, dtype=dtype)


def agree(routing: tuple[Tensor, Tensor, Tensor], *weights: Tensor | None, **options: Any) -> None:
    expected = reference(*routing, *weights, **options)  # type: ignore[arg-type]
    result = run_moe(pack_moe(*weights, **options), *routing)  # type: ignore[arg-type]
    assert result.dtype == expected.dtype
    tolerance = 2e-2 if result.dtype == torch.bfloat16 else 1e-6
    assert float((result - expected).float().norm()) <= tolerance * float(expected.float().norm())


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("layout", ["gate_up", "up_gate", "interleaved", "single"])
def test_any_number_of_tokens_and_any_layout(tokens: int, layout: str) -> None:
    width = INNER if layout == "single" else 2 * INNER
    agree(routed(tokens), draw(EXPERTS, width, HIDDEN), draw(EXPERTS, HIDDEN, INNER), layout=layout)


@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_separate_projections_with_biases(tokens: int) -> None:
    gate, down = draw(EXPERTS, INNER, HIDDEN), draw(EXPERTS, HIDDEN, INNER)
    biases = draw(EXPERTS, INNER), draw(EXPERTS, HIDDEN), draw(EXPERTS, INNER) + 1
    agree(routed(tokens), gate, down, gate.flip(0), *biases, layout="separate")


@pytest.mark.parametrize(("hidden", "inner"), [(17, 1), (65, 130), (600, 70)])
def test_sizes_that_are_no_multiple_of_a_vector(hidden: int, inner: int) -> None:
    tokens, top_k = 37, 2
    index = torch.randint(0, EXPERTS, (tokens, top_k), generator=torch.Generator().manual_seed(1))
    routing = draw(2 * tokens, hidden)[::2], index, draw(tokens, top_k)  # every other row: the stride is twice as long
    biases = draw(EXPERTS, 2 * inner), draw(EXPERTS, hidden)
    agree(routing, draw(EXPERTS, 2 * inner, hidden), draw(EXPERTS, hidden, inner), None, *biases)


@pytest.mark.parametrize("tokens", [1, 200])
def test_clamped_gates_stored_transposed(tokens: int) -> None:
    first, down = draw(EXPERTS, HIDDEN, 2 * INNER), draw(EXPERTS, INNER, HIDDEN)
    biases = draw(EXPERTS, 2 * INNER), draw(EXPERTS, HIDDEN)
    clamp: dict[str, Any] = {"activation": "swish", "alpha": 1.702, "limit": 1.0, "up_offset": 1.0}
    agree(routed(tokens), first, down, None, *biases, layout="interleaved", transposed=True, **clamp)


@pytest.mark.parametrize("tokens", [1, 5])
def test_bf16(tokens: int) -> None:
    weights = (
        draw(EXPERTS, 2 * INNER, HIDDEN, dtype=torch.bfloat16),
        draw(EXPERTS, HIDDEN, INNER, dtype=torch.bfloat16),
    )
    agree(routed(tokens, dtype=torch.bfloat16), *weights)


@pytest.mark.parametrize("tokens", [1, 5])
def test_pairs_of_experts_that_are_not_held_add_nothing(tokens: int) -> None:
    hidden, index, weight = routed(tokens)
    for shifted in (index - 1, index + 2):
        agree((hidden, shifted, weight), draw(EXPERTS, 2 * INNER, HIDDEN), draw(EXPERTS, HIDDEN, INNER))


def test_weights_that_lie_right_are_not_copied(kernel: str) -> None:
    if kernel == "native":
        pytest.skip("the native kernel packs its weights")
    first, down = draw(EXPERTS, HIDDEN, 2 * INNER), draw(EXPERTS, INNER, HIDDEN)
    packed = pack_moe(first, down, transposed=True)
    assert isinstance(packed, PackedMoe)
    assert packed.first.data_ptr() == first.data_ptr() and packed.down.data_ptr() == down.data_ptr()
