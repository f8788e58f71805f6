"""``regraft::moe``: the definition against a sum over pairs in fp64, and its corner cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.ir.ops.moe import GateFunction, moe, reference


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """``hidden [5, 8]``, ``index`` and ``weight [5, 2]``, ``first [3, 12, 8]``, ``down [3, 8, 6]``."""
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 8), (5, 2), (3, 12, 8), (3, 8, 6)
    hidden, weight, first, down = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return hidden, torch.randint(0, 3, (5, 2), generator=generator), weight, first, down


def by_pairs(hidden: Tensor, index: Tensor, weight: Tensor, first: Tensor, down: Tensor) -> Tensor:
    """SwiGLU experts, one pair at a time, in fp64."""
    hidden, weight, first, down = (t.double() for t in (hidden, weight, first, down))
    out = torch.zeros_like(hidden)
    for token, experts in enumerate(index.tolist()):
        for k, expert in enumerate(experts):
            gate, up = (first[expert] @ hidden[token]).chunk(2)
            out[token] += weight[token, k] * (down[expert] @ (gate * torch.sigmoid(gate) * up))
    return out


def test_it_is_the_weighted_sum_over_a_token_s_experts() -> None:
    given = tensors()
    torch.testing.assert_close(moe(*given).double(), by_pairs(*given), rtol=1e-5, atol=1e-5)


def test_an_expert_named_twice_counts_twice_and_one_never_named_not_at_all() -> None:
    hidden, _, weight, first, down = tensors()
    index = torch.ones(5, 2, dtype=torch.int64)
    once = moe(hidden, index[:, :1], weight.sum(1, keepdim=True), first, down)
    torch.testing.assert_close(moe(hidden, index, weight, first, down), once)


def test_the_parts_of_two_shards_add_up() -> None:
    hidden, index, weight, first, down = tensors()
    parts = [moe(hidden, index - start, weight, first[start:end], down[start:end]) for start, end in ((0, 2), (2, 3))]
    torch.testing.assert_close(parts[0] + parts[1], moe(hidden, index, weight, first, down))


def test_every_layout_of_the_same_experts_gives_the_same() -> None:
    hidden, index, weight, first, down = tensors()
    gate, up = first.chunk(2, dim=1)
    expected = moe(hidden, index, weight, first, down)
    interleaved = torch.stack([gate, up], 2).flatten(1, 2)
    turned = (first.transpose(1, 2), down.transpose(1, 2))
    for given, options in (
        ((torch.cat([up, gate], 1), down), {"layout": "up_gate"}),
        ((interleaved, down), {"layout": "interleaved"}),
        ((gate, down, up), {"layout": "separate"}),
        (turned, {"transposed": True}),
        ((first, down), {"activation": "swish", "alpha": 1.0}),
    ):
        torch.testing.assert_close(moe(hidden, index, weight, *given, **options), expected)


def test_the_clamped_gate_function() -> None:
    gate, up = torch.tensor([9.0, -9.0, 1.0]), torch.tensor([-9.0, 9.0, 0.5])
    function = GateFunction("swish", "separate", alpha=1.5, limit=7.0, up_offset=1.0)
    low, high = gate.clamp(max=7), up.clamp(-7, 7)
    torch.testing.assert_close(function(gate, up), (high + 1) * low / (1 + torch.exp(-1.5 * low)))


def test_bf16_is_summed_in_fp32() -> None:
    given = tensors(torch.bfloat16)
    result = reference(*given)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), by_pairs(*given), rtol=2e-2, atol=2e-1)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown layout 'rows'"):
        moe(*tensors(), layout="rows")


@pytest.mark.parametrize("options", [{}, {"limit": 7.0, "up_offset": 1.0, "activation": "swish"}])
def test_the_operator_keeps_torch_s_rules(options: dict[str, Any]) -> None:
    torch.library.opcheck(moe, tensors(), options)
