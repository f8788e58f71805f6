"""The log-sum-exp of attention's scores on the CPU is its formula in fp64, natively and by definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regraft.codegen.cpu.lower import lower
from regraft.codegen.cpu.native.attention import log_sum_exp
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native_operators import lse_native
from regraft.ir.ops import attention_lse
from regraft.ir.verify import relative_l2
from tests.codegen.cpu.support import needs_native
from tests.support import captured


def draw(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(query: Tensor, key: Tensor, scale: float, softcap: float) -> Tensor:
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.double() @ key.mT * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    top = scores.amax(-1, keepdim=True)
    return (scores - top).exp().sum(-1).log() + top[..., 0]


@needs_native
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    length=st.integers(1, 100),
    keys=st.integers(1, 600),
    head_dim=st.integers(1, 40),
    scale=st.sampled_from([0.2, 1.0, -0.5]),
    softcap=st.sampled_from([0.0, 3.0]),
)
def test_the_kernel_is_the_formula(
    batch: int, kv_heads: int, groups: int, length: int, keys: int, head_dim: int, scale: float, softcap: float
) -> None:
    query = draw(batch, length, kv_heads * groups, head_dim).transpose(1, 2)
    key = draw(batch, kv_heads, keys, head_dim, seed=1)
    library = NATIVE.library()
    found = log_sum_exp(library, query, key, None, None, None, scale, softcap, None, None).run(library)
    assert relative_l2(found, formula(query, key, scale, softcap).float()) < 1e-5


@needs_native
def test_scores_that_no_exponential_holds() -> None:
    library = NATIVE.library()
    query, key = torch.full((1, 1, 2, 4), 30.0), torch.full((1, 1, 5, 4), 30.0)
    found = log_sum_exp(library, query, key, None, None, None, 1.0, 0.0, None, None).run(library)
    assert torch.allclose(found, torch.tensor(3600.0 + math.log(5)), rtol=1e-6)
    key[0, 0, 3, 1] = math.nan
    assert log_sum_exp(library, query, key, None, None, None, 1.0, 0.0, None, None).run(library).isnan().all()


@pytest.mark.parametrize("mask", ["band(None,0)", "keys(0) & band(-9,3)", "dense(1)"])
def test_masks_and_sinks_are_lowered_too(mask: str) -> None:
    query, key, sinks = draw(2, 4, 30, 8), draw(2, 2, 40, 8, seed=1), draw(4, seed=2)
    tensors = [torch.arange(40)[None] < torch.tensor([[40], [7]]), draw(2, 1, 30, 40, seed=3) > 0]
    options = {"scale": 0.3, "mask": mask, "softcap": 5.0}
    executable = lower(captured(lambda q, k, a, b, s: attention_lse(q, k, [a, b], None, None, s, **options),
                                (query, key, *tensors, sinks)))  # fmt: skip
    (found,) = executable(query, key, *tensors, sinks)
    wanted = attention_lse(query.double(), key.double(), tensors, None, None, sinks.double(), **options)
    assert relative_l2(found.double(), wanted) < 1e-6
    native = any(node.target is lse_native for node in executable.module.graph.nodes)
    assert native == (not NATIVE.missing())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_site_is_lowered_to_the_kernel_where_it_is_in_fp32(dtype: torch.dtype) -> None:
    query, key = draw(2, 4, 70, 8, dtype=dtype), draw(2, 2, 90, 8, seed=1, dtype=dtype)
    program = captured(lambda q, k: attention_lse(q, k, [], scale=0.3), (query, key))
    executable = lower(program)
    (found,) = executable(query, key)
    assert found.dtype == dtype and relative_l2(found.double(), formula(query, key, 0.3, 0.0)) < 1e-6
    native = any(node.target is lse_native for node in executable.module.graph.nodes)
    assert native == (dtype == torch.float32 and not NATIVE.missing())
