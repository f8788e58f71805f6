"""A site whose mask is decided by tensors is measured with what these hold on the example inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.codegen.cpu import attention as lowering
from regraft.codegen.cpu.attention_masks import additive_mask
from regraft.codegen.cpu.lower import lower
from regraft.codegen.cpu.tuning import Tuner, TuningRecord
from regraft.ir.ops import attention
from regraft.ir.verify import relative_l2
from tests.codegen.cpu.support import needs_native
from tests.support import captured

LENGTH, SIZE = 24, 8
X = torch.randn(2, 2, LENGTH, SIZE, generator=torch.Generator().manual_seed(0))
DOCUMENTS = (torch.arange(LENGTH) // 9).expand(2, LENGTH)


def measured(function: Callable[..., Tensor], *inputs: Tensor) -> TuningRecord:
    """What was measured for the only attention of ``function``, whose lowered form is compared with it."""
    program, tuner = captured(function, inputs), Tuner()
    (found,) = lower(program, tuner)(*inputs)
    assert relative_l2(found, function(*inputs)) < 1e-5
    (record,) = tuner.records.values()
    return record


def attend(x: Tensor, mask: str, *tensors: Tensor, **options: Any) -> Tensor:
    found: Tensor = attention(x, x, x, list(tensors), mask=mask, scale=0.3, empty_rows="zero", **options)
    return found


@needs_native
def test_packed_documents_are_those_of_the_example() -> None:
    record = measured(lambda x, ids: attend(x, "band(None,0) & same(0,0)", ids), X, DOCUMENTS)
    assert set(record.seconds) == {"native", "sdpa"}


@needs_native
def test_lengths_of_a_batch_are_those_of_the_example() -> None:
    """PyTorch's kernel is charged for the mask that it needs in each call."""
    record = measured(lambda x, counts: attend(x, "band(None,0) | lengths(0)", counts), X, torch.tensor([3, 20]))
    assert set(record.seconds) == {"native", "sdpa"}


@needs_native
@pytest.mark.parametrize("mask", ["all", "band(-3,0)"])
def test_low_precision_is_measured_beside_what_pytorch_computes_it_in(mask: str) -> None:
    x = X.bfloat16()
    program, tuner = captured(lambda x: attend(x, mask), (x,)), Tuner()
    (found,) = lower(program, tuner)(x)
    assert found.dtype == torch.bfloat16 and relative_l2(found, attend(x.float(), mask)) < 1e-2
    (record,) = tuner.records.values()
    assert set(record.seconds) == {"native", "sdpa"}


@needs_native
def test_a_constant_tree_is_known() -> None:
    tree = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (torch.arange(LENGTH) % 3 != 1)
    tree |= torch.eye(LENGTH, dtype=torch.bool)
    record = measured(lambda x: attend(x, "dense(0)", tree[None, None]), X)
    assert set(record.seconds) == {"native", "sdpa"}


@needs_native
def test_documents_that_the_model_itself_makes_are_not_computed_to_measure() -> None:
    def model(x: Tensor) -> Tensor:
        ids = (x[:, 0, :, 0] > 0).long().cumsum(-1)
        return attend(x, "band(None,0) & same(0,0)", ids)

    record = measured(model, X)
    assert record.kernel == "native" and set(record.seconds) == {"native"}


def test_a_mask_that_constants_decide_is_made_once_for_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "native_can", lambda given: False)
    monkeypatch.setattr(lowering, "blocks_can", lambda context, given: False)
    tree = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (torch.arange(LENGTH) % 3 != 1)
    tree = (tree | torch.eye(LENGTH, dtype=torch.bool))[None, None]

    def model(x: Tensor) -> Tensor:
        return attend(x, "dense(0)", tree)

    executable = lower(captured(model, (X,)))
    (found,) = executable(X)
    assert relative_l2(found, model(X)) < 1e-5
    assert not any(node.target is additive_mask for node in executable.module.graph.nodes)
