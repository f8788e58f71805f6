"""Weights that wait in a file are the weights that they were, and come back where nothing was compiled."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft.build import Toolchain
from regraft.codegen.cpu.tuning import Tuner
from regraft.errors import InputError
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.parking import Parking

LARGE = (512, 1024)  # 2 MB


class Weights(nn.Module):
    """Tensors of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Parameter(torch.randn(LARGE))
        self.transposed = nn.Parameter(torch.randn(LARGE).t())
        self.sixteen = nn.Parameter(torch.randn(1024, 1024).to(torch.bfloat16), requires_grad=False)
        self.register_buffer("whole", torch.arange(1 << 18))
        self.small = nn.Parameter(torch.randn(8))
        whole = torch.randn(1024, 1024)
        self.first, self.second = nn.Parameter(whole[:512]), nn.Parameter(whole[512:])  # one memory


def mapped(tensor: Tensor) -> bool:
    """Whether the memory of a tensor is that of a file."""
    place = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= place < end:
            return "deleted" in line
    return False


def test_what_is_parked_keeps_identity_values_strides_and_type() -> None:
    model = Weights()
    before = {
        name: (id(value), value.detach().clone(), value.stride())
        for name, value in model.state_dict(keep_vars=True).items()
    }
    parking = Parking(model)
    for value in model.state_dict(keep_vars=True).values():
        parking.park(value)
    for name, value in model.state_dict(keep_vars=True).items():
        identity, values, strides = before[name]
        assert id(value) == identity and value.stride() == strides and torch.equal(value, values), name
    assert not parking.refused
    assert {name for name, value in model.state_dict(keep_vars=True).items() if mapped(value)} == {
        "plain",
        "transposed",
        "sixteen",
        "whole",
    }


def test_what_comes_back_is_in_memory_and_can_be_written() -> None:
    model = Weights()
    values = model.plain.detach().clone()
    parking = Parking(model)
    parking.park(model.plain)
    parking.take_back()
    assert not mapped(model.plain) and torch.equal(model.plain, values) and model.plain.requires_grad
    with torch.no_grad():
        model.plain.add_(1)
    assert torch.equal(model.plain, values + 1)


def test_memory_that_does_not_hold_the_numbers_by_itself_stays() -> None:
    model = nn.Module()
    model.register_buffer("negated", torch._neg_view(torch.randn(LARGE)))
    with torch.inference_mode():
        model.register_buffer("inferred", torch.randn(LARGE))
    values = [value.clone() for value in model.buffers()]
    parking = Parking(model)
    for value in model.buffers():
        parking.park(value)
    parking.take_back()
    assert all(torch.equal(value, held) for value, held in zip(values, model.buffers(), strict=True))
    assert not any(mapped(value) for value in model.buffers())


def test_tensors_of_others_stay_where_they_are() -> None:
    model, other = Weights(), nn.Parameter(torch.randn(LARGE))
    Parking(model).park(other)
    assert not mapped(other)


def test_a_full_disk_leaves_weights_in_memory_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(Tuner, "choose", lambda self, shape, weight: "onednn")  # packed, whatever is fastest here
    model = nn.Sequential(nn.Linear(512, 1024)).eval()
    x = torch.randn(4, 512)
    expected = model(x).detach()
    fast = regraft.compile(model, x, free_original=True)
    assert torch.allclose(fast(x), expected, atol=1e-5)
    assert [event.reason for event in fast.report.events if event.kind == "memory"] == [
        "weights stay in memory until the outputs are compared: No space left on device"
    ]


def test_a_model_gives_way_while_it_is_packed_and_is_empty_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    parked: list[Tensor] = []
    park = Parking.park
    monkeypatch.setattr(Parking, "park", lambda self, tensor: (parked.append(tensor), park(self, tensor))[1])
    monkeypatch.setattr(Tuner, "choose", lambda self, shape, weight: "onednn")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(2048, 512), nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).eval()
    ids = torch.randint(0, 2048, (4, 64))
    expected, packed = model(ids).detach(), [model[1].weight, model[3].weight]
    fast = regraft.compile(model, ids, free_original=True)
    assert {id(tensor) for tensor in parked} == {id(tensor) for tensor in packed}  # an embedding is read as it is
    assert torch.allclose(fast(ids), expected, atol=1e-5)
    assert sum(value.numel() for value in model.parameters()) == 0


def test_a_model_whose_code_is_off_is_what_it_was() -> None:
    def wrong(program: Program, session: Session) -> Any:
        for tensor in program.weights.originals.values():
            assert session.read_last is not None
            session.read_last(tensor)
        return lambda x: [torch.zeros(4, 1024)]

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 1024)).eval(), torch.randn(4, 512)
    values, expected = model[0].weight.detach().clone(), model(x).detach()
    with pytest.raises(InputError, match="nothing is compiled"):
        regraft.compile(model, x, free_original=True, toolchain=Toolchain(Toolchain().pipeline, wrong))
    assert torch.equal(model[0].weight, values) and not mapped(model[0].weight)
    assert torch.equal(model(x), expected)
