"""Artifacts on the device that is found: what is said where it is not there, and a program moved as a whole.

A GPU is not needed: the meta device stands for it, on which nothing may meet a tensor of the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import regraft
from regraft import api, devices
from regraft.devices import device_of, move, running_device, what_differs
from regraft.errors import InputError, TargetError
from regraft.ir.program import Program
from tests.regraft.test_kernels import Attention, X, saved
from tests.support import captured

META = torch.device("meta")


class Places(nn.Module):
    """Names devices in every way: positions, a table, a buffer, a mask, a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("table", torch.arange(8.0).expand(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        y = self.second(self.first(x)) + torch.zeros(8) + self.table.sum(0) + places[:, None]
        scores = (y @ y.mT).masked_fill(~seen, -torch.inf).softmax(-1)
        return (scores @ y).to("cpu") + torch.tensor(2.0)


def values_of(program: Program) -> list[Tensor]:
    return [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]


@pytest.mark.parametrize("dynamic", [None, {"x": {1: torch.export.Dim("length", min=2, max=32)}}])
def test_all_of_a_program_moves(dynamic: object) -> None:
    program = captured(Places().eval(), (torch.randn(2, 5, 8),), dynamic)
    assert device_of(program).type == "cpu"
    move(program, META)
    assert {value.device for value in values_of(program)} == {META} == {device_of(program)}
    assert {weight.device for weight in program.weights.originals.values()} == {META}
    assert {value.device for value in program.example} == {META}
    (out,) = program.callable()(torch.empty(2, 5, 8, device=META))
    assert out.device == META and out.shape == (2, 5, 8)


def test_tied_weights_stay_tied_and_repeated_ones_take_no_memory() -> None:
    program = captured(Places().eval(), (torch.randn(2, 5, 8),))
    held = program.weights.originals
    held["again"] = held["table"]
    move(program, META)
    assert held["again"] is held["table"]
    assert held["table"].shape == (3, 8) and held["table"].stride(0) == 0


def test_a_call_that_names_no_device_gets_one() -> None:
    program = captured(nn.Linear(4, 4), (torch.randn(2, 4),))
    graph = program.graph
    (product,) = (node for node in graph.nodes if node.op == "call_function")
    with graph.inserting_before(product):
        row = graph.call_function(torch.ops.aten.arange.default, (4,))
        row.meta["val"] = program.fake_mode.from_tensor(torch.arange(4))
    with graph.inserting_after(product):
        total = graph.call_function(torch.ops.aten.add.Tensor, (product, row))
        total.meta["val"] = product.meta["val"]
    program.output_node.args = ((total,),)
    move(program, META)
    assert row.kwargs == {"device": META}
    assert program.callable()(torch.empty(2, 4, device=META))[0].device == META


def test_what_a_program_on_a_gpu_keeps_on_the_cpu_stays_there() -> None:
    program = captured(nn.Linear(4, 4), (torch.randn(2, 4),))
    (kept,) = (node for node in program.graph.nodes if program.weight_name(node) == "bias")
    move(program, META)
    with program.fake_mode:
        kept.meta["val"] = torch.empty(4)
    program.weights.originals["bias"] = torch.zeros(4)
    move(program, META)
    assert program.weights.originals["bias"].device.type == "cpu" == kept.meta["val"].device.type


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.parametrize(
    ("target", "device", "gpus", "found"),
    [
        ("cpu", None, 1, "cpu"),
        ("cuda:sm_90", None, 0, "cpu"),
        ("cuda:sm_90", None, 2, "cuda:0"),
        ("cuda", "cuda", 2, "cuda:0"),
        ("cuda", "cuda:1", 2, "cuda:1"),
        ("cuda", "cpu", 2, "cpu"),
        ("cuda", torch.device("cpu"), 0, "cpu"),
    ],
)
def test_where_an_artifact_runs(
    monkeypatch: pytest.MonkeyPatch, target: str, device: str | None, gpus: int, found: str
) -> None:
    with_gpus(monkeypatch, gpus)
    assert running_device(target, device) == torch.device(found)


@pytest.mark.parametrize(
    ("target", "device", "gpus", "why"),
    [
        ("cuda", "cuda", 0, "no GPU is here"),
        ("cuda", "cuda:3", 2, "2 GPUs are here"),
        ("cpu", "cuda", 1, "compiled for the CPU"),
        ("cuda", "tpu", 1, 'give "cpu", "cuda"'),
        ("cuda", "meta", 1, 'run on "cpu" and "cuda"'),
    ],
)
def test_why_it_does_not_run_there(
    monkeypatch: pytest.MonkeyPatch, target: str, device: str, gpus: int, why: str
) -> None:
    with_gpus(monkeypatch, gpus)
    with pytest.raises(TargetError, match=why):
        running_device(target, device)


def test_a_gpu_of_another_architecture_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "arch_of", lambda device: "sm_80")
    gpu = torch.device("cuda:0")
    told = what_differs("cuda:sm_90", gpu)
    assert told is not None and "compiled for sm_90, and the GPU here is sm_80" in told
    assert what_differs("cuda", gpu) is None is what_differs("cuda:sm_80", gpu)


def test_without_a_gpu_an_artifact_for_one_runs_its_definitions_and_says_so(tmp_path: Path) -> None:
    path = saved(tmp_path)
    loaded = regraft.load(path, device="cpu")
    torch.testing.assert_close(loaded(X), Attention().eval()(X), rtol=1e-5, atol=1e-5)
    assert [event.reason for event in loaded.report.events if event.kind == "device"] == [
        "compiled for 'cuda:sm_90' and loaded on the CPU: its kernels run as their definitions"
    ]


def test_an_artifact_from_a_machine_without_a_gpu_loads_onto_the_one_that_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    monkeypatch.setattr(api, "running_device", lambda target, device: META)
    monkeypatch.setattr(api, "what_differs", lambda target, device: None)
    loaded = regraft.load(path)
    assert loaded(X.to("meta")).shape == X.shape and loaded(X.to("meta")).device == META
    called = [str(node.target) for node in loaded.entries[0].executable.module.graph.nodes]
    assert any("regraft_kernels" in name for name in called)
    with pytest.raises(InputError, match=r"give inputs like those it was compiled for: float32\[2, 9, 16\] on meta"):
        loaded(X)


def test_no_call_names_another_device() -> None:
    program = captured(Places().eval(), (torch.randn(2, 5, 8),))
    move(program, META)

    def devices_in(node: fx.Node) -> set[torch.device]:
        found: set[torch.device] = set()
        torch.utils._pytree.tree_map_only(torch.device, found.add, (list(node.args), dict(node.kwargs)))
        return found

    assert set().union(*map(devices_in, program.graph.nodes)) == {META}
