"""Calls recorded once and replayed, with a recorder of the test's own in the place of a GPU's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft import cuda_graphs
from regraft.cuda_graphs import Graphed, copies, graphed, why_not
from tests.support import captured


class Recorder:
    """Does at a replay what a graph does: the same calls on the same memory, nothing of Python in between."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.recorded, self.replayed = device, 0, 0

    def record(self, run: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        self.recorded += 1
        self._run = run
        self._outputs = run()
        return self._outputs

    def replay(self) -> None:
        self.replayed += 1
        for held, new in zip(self._outputs, self._run(), strict=True):
            if isinstance(held, Tensor):
                held.copy_(new)

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()


def twice(x: Tensor, factor: int) -> list[Any]:
    return [x * factor, factor]


def test_inputs_are_copied_in_and_outputs_copied_out() -> None:
    recorder, told = Recorder(), list[str]()
    run = Graphed(twice, recorder, told.append)
    first, _ = run(torch.ones(3), 2)
    second, number = run(torch.arange(3.0), 2)
    assert first.tolist() == [2, 2, 2] and second.tolist() == [0, 2, 4] and number == 2
    assert (recorder.recorded, recorder.replayed) == (1, 2) and not told


@pytest.mark.parametrize(
    "other", [(torch.ones(4), 2), (torch.ones(3), 3), (torch.ones(3).double(), 2), (torch.ones(3), 2.0)]
)
def test_what_was_not_recorded_runs_as_it_is(other: tuple[Any, ...]) -> None:
    recorder = Recorder()
    run = Graphed(twice, recorder, print)
    run(torch.ones(3), 2)
    given, _ = run(*other)
    assert torch.equal(given, other[0] * other[1]) and given.dtype == (other[0] * other[1]).dtype
    assert recorder.replayed == 1


def test_an_input_in_another_order_of_memory_is_the_same_call() -> None:
    recorder = Recorder()
    run = Graphed(twice, recorder, print)
    run(torch.ones(2, 3), 2)
    x = torch.arange(6.0).reshape(3, 2).T
    assert torch.equal(run(x, 2)[0], x * 2) and recorder.replayed == 2


def test_where_recording_fails_calls_run_and_it_is_told_once() -> None:
    class Refuses(Recorder):
        def record(self, run: Callable[[], Sequence[Any]]) -> Sequence[Any]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    told: list[str] = []
    run = Graphed(twice, Refuses(), told.append)
    for _ in range(2):
        assert run(torch.ones(3), 2)[0].tolist() == [2, 2, 2]
    (reason,) = told
    assert "operation not permitted when stream is capturing" in reason and "calls run one by one" in reason


def test_an_output_that_is_an_input_is_not_recorded() -> None:
    told: list[str] = []
    run = Graphed(lambda x: [x[1:]], Recorder(), told.append)
    x = torch.arange(3.0)
    assert run(x)[0].data_ptr() == x[1:].data_ptr() and "shares memory with an input" in told[0]


def test_outputs_share_memory_with_each_other_as_before() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    given = copies([x, x[1:].T, torch.ones(2), None])
    assert torch.equal(given[0], x) and torch.equal(given[1], x[1:].T) and given[3] is None
    given[0][1, 0] = -1
    assert given[1][0, 0] == -1 and x[1, 0] == 4


def test_calls_of_several_threads_take_turns() -> None:
    run = Graphed(twice, Recorder(), print)
    found: dict[int, Tensor] = {}

    def call(number: int) -> None:
        for _ in range(20):
            found[number] = run(torch.full((64,), float(number)), 2)[0]
            assert bool((found[number] == 2 * number).all())

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: float(value[0]) for number, value in found.items()} == {n: 2.0 * n for n in range(4)}


class Counts(nn.Module):
    """Writes to a buffer."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.count += 1
        return {"y": self.linear(x) * self.count, "x": x}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Programs on the CPU are recorded, by recorders that the test sees."""
    made: list[Recorder] = []

    def recorder(device: torch.device) -> Recorder:
        made.append(Recorder(device))
        return made[-1]

    monkeypatch.setattr(cuda_graphs, "why_not", lambda program, capture: None)
    monkeypatch.setattr(cuda_graphs, "GpuCapture", recorder)
    return made


def test_a_compiled_model_is_recorded_for_each_shape(on_cpu: list[Recorder], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()
    fast = regraft.compile(model, torch.randn(2, 4), cuda_graphs=True)
    for x in (torch.randn(2, 4), torch.randn(3, 4), torch.randn(2, 4)):
        torch.testing.assert_close(fast(x), model(x).detach())
    fast(torch.randn(3, 4))
    assert [recorder.replayed for recorder in on_cpu] == [2, 1]  # the call that compiles has its answer already
    fast.save(tmp_path / "m.regraft")
    loaded = regraft.load(tmp_path / "m.regraft", cuda_graphs=True)
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), model(x).detach())
    assert on_cpu[-1].replayed == 1


def test_buffers_that_a_model_writes_to_are_read_anew(on_cpu: list[Recorder]) -> None:
    model, twin = Counts().eval(), Counts().eval()
    fast = regraft.compile(model, torch.randn(2, 4), cuda_graphs=True)
    for number in range(4):
        x = torch.randn(2, 4)
        torch.testing.assert_close(fast(x)["y"], twin(x)["y"].detach())
        assert int(model.count) == number + 1
    assert [event.reason for event in fast.report.events if event.kind == "cuda graph"] == [
        "an output shares memory with an input, which a graph cannot give back: calls run one by one"
    ]


def test_on_a_cpu_it_does_not_apply_and_that_is_told() -> None:
    model = nn.Linear(4, 4).eval()
    fast = regraft.compile(model, torch.randn(2, 4), cuda_graphs=True)
    torch.testing.assert_close(fast(torch.ones(2, 4)), model(torch.ones(2, 4)).detach())
    assert [event.reason for event in fast.report.events] == [
        "the model is on the CPU, which has no CUDA graphs: calls run one by one"
    ]


def test_symbolic_sizes_are_not_recorded() -> None:
    program = captured(nn.Linear(4, 4), (torch.randn(2, 4),), {"input": {0: torch.export.Dim("batch", min=2, max=9)}})
    assert why_not(program, Recorder) == "its sizes are symbolic, and a graph holds for one shape"
    told: list[str] = []
    executable = program.callable()
    assert graphed(program, executable, told.append, Recorder) is executable and len(told) == 1


def test_a_program_on_two_devices_is_not_recorded() -> None:
    program = captured(nn.Linear(4, 4), (torch.randn(2, 4),))
    node = program.weight_placeholders()[0]
    node.meta["val"] = node.meta["val"].to("meta")
    assert why_not(program, Recorder) == "it is on several devices (cpu, meta)"
