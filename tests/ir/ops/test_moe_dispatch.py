"""``regraft::moe_dispatch`` and ``moe_combine`` in one process that plays every rank: which rows are sent, which copy
of an expert serves a token, and that the parts add up to ``regraft::moe``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.ir.copies import CopyCount, Dispatched
from regraft.ir.ops import moe, moe_combine, moe_dispatch
from regraft.ir.ops.moe_dispatch import served_slots, token_copy
from regraft.ir.transport import GroupError
from regraft.solvers.placement import split
from regraft.solvers.placement.cluster import Cluster

#: Two ranks of two slots: expert 0 in slots 0 and 3, expert 1 in slot 1, expert 2 in slot 2.
COPIES = torch.tensor([[0, 3], [1, -1], [2, -1]])
SIZES = {"ranks": 2, "slots": 2}
QUIETLY = settings(deadline=None, derandomize=True, max_examples=60)


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """A layer's table ``[ranks, slots]`` with every expert at least once, replicas, empty slots; number of experts."""
    experts, ranks = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    slots = -(-experts // ranks) + draw(st.integers(0, 2))
    rest = ranks * slots - experts
    more = draw(st.lists(st.integers(-1, experts - 1), min_size=rest, max_size=rest))
    order = draw(st.permutations([*range(experts), *more]))
    return np.array(order, dtype=np.int64).reshape(ranks, slots), experts


def tensors(tokens: int, top_k: int, experts: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """``hidden [tokens, 8]``, ``index`` (some outside), ``weight [tokens, top_k]``, SwiGLU ``first`` and ``down``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (tokens, 8), (tokens, top_k), (experts, 12, 8), (experts, 8, 6)
    hidden, weight, first, down = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return [hidden, torch.randint(-1, experts + 1, (tokens, top_k), generator=generator), weight, first, down]


@QUIETLY
@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 1 << 20), st.integers(0, 64)), min_size=1))
def test_the_hash_is_the_one_that_plans_predict_with(cases: list[tuple[int, int, int]]) -> None:
    token, expert, count = (np.array(column, dtype=np.int64) for column in zip(*cases, strict=True))
    found = token_copy(*map(torch.from_numpy, (token, expert, count)))
    assert found.tolist() == split.token_copy(token, expert, count).tolist()


@QUIETLY
@given(tables(), st.integers(0, 9), st.integers(1, 3))
def test_a_choice_is_served_where_the_plan_predicts(case: tuple[np.ndarray, int], tokens: int, top_k: int) -> None:
    table, experts = case
    index = tensors(tokens, top_k, experts)[1]
    known = np.where((index >= 0) & (index < experts), index, -1)
    cluster, places = Cluster.uniform(1, len(table)), np.arange(tokens)
    expected = split.chosen_ranks(table, known, places, places, cluster, "even", experts)
    found = served_slots(index, torch.from_numpy(split.Copies.of(table, experts).slots))
    assert torch.where(found >= 0, found // table.shape[1], -1).tolist() == expected.tolist()


@QUIETLY
@given(tables(), st.integers(0, 9), st.integers(1, 3), st.booleans())
def test_the_parts_of_all_ranks_add_up(case: tuple[np.ndarray, int], tokens: int, top_k: int, per_choice: bool) -> None:
    table, experts = case
    hidden, index, weight, first, down = tensors(tokens, top_k, experts, torch.float64)
    copies = torch.from_numpy(split.Copies.of(table, experts).slots)
    options = {"ranks": table.shape[0], "slots": table.shape[1], "per_choice": per_choice}
    rows, slot, shares, token, counts = moe_dispatch(hidden, index, weight, copies, **options)
    lying = torch.from_numpy(np.maximum(table.reshape(-1), 0))
    results = moe(rows, slot, shares, first[lying], down[lying])
    out = moe_combine(results, token, counts, tokens, ranks=len(table), dtype=torch.float64)
    torch.testing.assert_close(out, moe(hidden, index, weight, first, down))


def test_a_token_goes_once_to_each_rank_with_its_choices_there() -> None:
    index = torch.tensor([[1, 2], [0, 1], [2, 2]])
    hidden = torch.arange(3.0)[:, None]
    rows, slot, weight, token, counts = moe_dispatch(hidden, index, torch.ones(3, 2), COPIES, **SIZES)
    assert token.tolist() == rows[:, 0].tolist() == [0, 1, 0, 1, 2]
    # token 1 hashes to the second copy of expert 0, in slot 3
    assert slot.tolist() == [[1, -1], [-1, 1], [-1, 2], [3, -1], [2, 2]]
    assert weight.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0], [1, 1]]
    assert counts.tolist() == [[2, 3], [2, 3]]


def test_or_once_for_each_choice() -> None:
    index = torch.tensor([[1, 2], [0, 1], [2, 2]])
    options = {**SIZES, "per_choice": True}
    _, slot, _, token, counts = moe_dispatch(torch.ones(3, 1), index, torch.ones(3, 2), COPIES, **options)
    assert token.tolist() == [0, 1, 0, 1, 2, 2]
    assert slot.tolist() == [[1], [1], [2], [3], [2], [2]]
    assert counts[0].tolist() == [2, 4]


def test_what_no_expert_serves_is_not_sent_and_comes_back_as_zero() -> None:
    index = torch.tensor([[9, -1], [1, 7]])
    rows, _, _, token, counts = moe_dispatch(torch.ones(2, 1), index, torch.ones(2, 2), COPIES, **SIZES)
    assert (token.tolist(), counts[0].tolist()) == ([1], [1, 0])
    out = moe_combine(rows, token, counts, 2, ranks=2, dtype=torch.float32)
    assert out.tolist() == [[0], [1]]


def test_bf16_stays_wide_until_all_parts_are_summed() -> None:
    """256 + 1 + 1: in bf16 each 1 is lost."""
    weight = torch.tensor([[256.0, 1.0, 1.0]], dtype=torch.bfloat16)
    index = torch.tensor([[1, 2, 0]])
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    rows, slot, shares, token, counts = moe_dispatch(hidden, index, weight, COPIES, **SIZES)
    assert (rows.dtype, shares.dtype) == (torch.bfloat16, torch.float32)
    results = (shares * (slot >= 0)).sum(1, keepdim=True)
    out = moe_combine(results, token, counts, 1, ranks=2, dtype=torch.bfloat16)
    assert (out.dtype, out.item()) == (torch.bfloat16, 258.0)


def test_without_a_process_group_code_for_one_says_what_to_do() -> None:
    with pytest.raises(GroupError, match=r"rank 1 of a model .* 2 ranks, and no process group .* --nproc-per-node 2"):
        moe_dispatch(*tensors(2, 1, 3)[:3], COPIES, rank=1, group="world", **SIZES)


def test_counts_add_up_by_layer_and_leave_out_what_stays() -> None:
    calls = (3, (2, 5)), (4, (1, 1)), (3, (1, 0))
    count = CopyCount([Dispatched(layer, 1, sent, torch.zeros(0, 2)) for layer, sent in calls])
    assert count.sent(3) == (3, 5)
    assert count.crossing == 4


@pytest.mark.parametrize("per_choice", [False, True])
def test_the_operators_keep_torch_s_rules(per_choice: bool) -> None:
    hidden, index, weight = tensors(4, 2, 3)[:3]
    torch.library.opcheck(moe_dispatch, (hidden, index, weight, COPIES), {**SIZES, "per_choice": per_choice})
    rows, _, _, token, counts = moe_dispatch(hidden, index, weight, COPIES, **SIZES)
    torch.library.opcheck(moe_combine, (rows, token, counts, 4), {"ranks": 2, "dtype": torch.bfloat16})
