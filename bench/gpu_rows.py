"""Parts of ``make gpu``: named rows that are measured one by one, kept as they come, and not measured twice."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.timing import time_in_turn, write_record
from regraft.ir.capture_error import first_line

#: Bytes that are written before each timed call, so that none finds its operands in the last-level cache.
_FLUSH = 256 << 20
#: Peers that the row which is being measured goes without, and why.
_LEFT_OUT: dict[str, str] = {}


@dataclass(frozen=True)
class Setting:
    """Where rows run. ``tiny``: sizes at which a CPU rehearses them."""

    device: str = "cuda"
    tiny: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether times mean anything."""
        return self.device != "cpu"

    @property
    def gpu_name(self) -> str:
        """The device's marketed name; empty on a CPU."""
        return torch.cuda.get_device_name() if self.on_gpu else ""

    def pick(self, full: Any, tiny: Any) -> Any:
        """The size of a row, or that of its rehearsal."""
        return tiny if self.tiny else full


@dataclass(frozen=True)
class Outcome:
    """What a row gave: figures by name with their units, whether it met its target, and the target in words.

    ``passed`` is None where no target holds: on another device than it was set for, or where the row only informs.
    ``met``: what the row says of the lines of ``gpu_targets.TARGETS``, by their names.
    """

    figures: Mapping[str, Any]
    passed: bool | None = None
    target: str = ""
    met: Mapping[str, bool] = field(default_factory=dict)


Row = Callable[[Setting], Outcome]


@dataclass(frozen=True)
class Part:
    """A part of the bench. ``seconds`` is what it may take on a GPU of the eight minutes that all parts have;
    ``processes``: rows that time nothing run side by side. ``apart``: each row has a process of its own, because what
    another one built would not be cold."""

    name: str
    seconds: float
    rows: Callable[[Setting], dict[str, Row]] = field(repr=False)
    processes: int = 1
    apart: bool = False


def run_part(part: Part, setting: Setting, path: Path, again: bool = False) -> dict[str, Any]:
    """Measure the rows of a part that ``path`` does not hold yet and then those that failed, write it anew after each,
    and return the record."""
    labels = list(part.rows(setting))
    known = {} if again else _known(path, setting)
    found: dict[str, Any] = {label: known[label] for label in labels if label in known}
    record = _write(part, setting, path, labels, found)
    failed = [label for label, row in found.items() if row["passed"] is False]
    for label, row in _measured(part, setting, [*(label for label in labels if label not in found), *failed]):
        found[label] = row
        record = _write(part, setting, path, labels, found)
    return record


def measure_row(part: Part, label: str, setting: Setting) -> dict[str, Any]:
    """One row as plain data; what it raises is its failure."""
    started = time.perf_counter()
    _LEFT_OUT.clear()
    try:
        outcome = part.rows(setting)[label](setting)
    except Exception as error:  # a row must not take the others with it
        return _failed(error, time.perf_counter() - started)
    return _plain(outcome, time.perf_counter() - started)


def _failed(error: Exception, seconds: float) -> dict[str, Any]:
    lines = str(error).strip().splitlines() or ["no message"]
    return _plain(Outcome({"error": f"{type(error).__name__}: {lines[0]}"}, passed=False), seconds)


def _plain(outcome: Outcome, seconds: float) -> dict[str, Any]:
    return {**asdict(outcome), "left_out": dict(_LEFT_OUT), "seconds": round(seconds, 2)}


def _measured(part: Part, setting: Setting, labels: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if (part.processes == 1 and not part.apart) or not setting.on_gpu:
        for label in labels:
            yield label, measure_row(part, label, setting)
        return
    tasks = 1 if part.apart else None
    with ProcessPoolExecutor(part.processes, get_context("spawn"), max_tasks_per_child=tasks) as executor:
        waiting = {executor.submit(_by_name, part.name, label, setting): label for label in labels}
        for future in as_completed(waiting):
            try:
                yield waiting[future], future.result()
            except Exception as error:  # the process died
                yield waiting[future], _failed(error, 0.0)


def _by_name(part: str, label: str, setting: Setting) -> dict[str, Any]:
    from bench.gpu import PARTS

    return measure_row(PARTS[part], label, setting)


def _known(path: Path, setting: Setting) -> dict[str, Any]:
    """Rows of an earlier run on the same device at the same sizes."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return dict(held["rows"]) if held["setting"] == _described(setting) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _described(setting: Setting) -> dict[str, Any]:
    return {**asdict(setting), "gpu": setting.gpu_name, "torch": torch.__version__}


def _write(part: Part, setting: Setting, path: Path, labels: list[str], found: dict[str, Any]) -> dict[str, Any]:
    record = {
        "part": part.name,
        "setting": _described(setting),
        "complete": len(found) == len(labels),
        "missing": [label for label in labels if label not in found],
        "rows": {label: found[label] for label in labels if label in found},
    }
    write_record("gpu", record, path)
    return record


def device_times(calls: Mapping[str, Callable[[], Any]], setting: Setting, rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of each call, made in turn; on a GPU by its own clock, the last-level cache being flushed
    before each. A call that raises is left out of the result, and the row and stderr tell the reason."""
    able = {name: call for name, call in calls.items() if _runs(name, call)}
    if not setting.on_gpu:
        return {name: timing.median for name, timing in time_in_turn(able, rounds=1, warm_up=0, shortest=0).items()}
    flush = torch.empty(_FLUSH, dtype=torch.int8, device=setting.device)
    for call in able.values():
        for _ in range(3):
            call()
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in able}
    for number in range(rounds):
        names = list(able)
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            able[name]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: sorted(a.elapsed_time(b) for a, b in pairs)[rounds // 2] for name, pairs in events.items()}


def _runs(name: str, call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception as error:  # a peer must not take the row with it
        tell_left_out(name, error)
        return False
    return True


def tell_left_out(name: str, error: Exception) -> None:
    """Say on stderr, and in the row that is being measured, why a peer is missing from the table."""
    _LEFT_OUT[name] = first_line(error)
    print(f"{name} was left out: {_LEFT_OUT[name]}", file=sys.stderr)


def offered(makers: Mapping[str, Callable[[], Callable[[], Any]]]) -> dict[str, Callable[[], Any]]:
    """The calls that can be made here; of one whose library is not installed, the row tells why it is left out."""
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:  # not installed, or another version: a peer must not take the row with it
            tell_left_out(name, error)
    return found


def captured(name: str, call: Callable[[], Any], setting: Setting) -> Callable[[], Any]:
    """A call as a CUDA graph, so that the time of launching is nobody's: on a CPU, or where it cannot be captured, the
    call itself."""
    if not setting.on_gpu:
        return call
    torch.cuda.synchronize()
    try:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            held = call()
    except RuntimeError as error:
        tell_left_out(f"{name} in a CUDA graph", error)
        return call

    def replay() -> Any:
        graph.replay()
        return held

    return replay


def copy_bandwidth(setting: Setting) -> float:
    """Bytes a second that a copy of a large tensor reads and writes."""
    count = setting.pick(1 << 30, 1 << 20)
    source = torch.ones(count, dtype=torch.int8, device=setting.device)
    target = torch.empty_like(source)
    milliseconds = device_times({"copy": lambda: target.copy_(source)}, setting)["copy"]
    return 2.0 * count / (milliseconds * 1e-3)
