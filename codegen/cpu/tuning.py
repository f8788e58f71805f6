"""Choosing a kernel for a linear layer or an attention site by measurement, once a shape: never on a serving path.

A record is data: shape and thread count -> kernel. Records can be saved with an artifact and given back, so that
loading measures nothing.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.attention_measured import AttentionShape, Sample
from regraft.codegen.cpu.context import Emitter
from regraft.codegen.cpu.linear_kernels import KERNELS, LinearShape, Operands, applicable
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.timing import best_in_turn
from regraft.ir.memory import give_back

_SECONDS_PER_SHAPE = 0.06
_LARGER_THAN_CACHES = 64 << 20  # bytes
_NEIGHBOUR, _NEIGHBOUR_ROWS = 512, 64  # features and rows of the product that is run beside each kernel
_UNKNOWN_ROWS = 256  # where their number is symbolic
_MOST_PRODUCTS = 1 << 27  # of numbers, in a layer that is measured: more take longer, and tell nothing else
_ENOUGH_ROWS, _ENOUGH_COLUMNS = 192, 1024  # are measured whatever that makes
_MOST_NUMBERS = 1 << 19  # of a weight or of results
_WHOLE_PANELS = 128  # columns: a kernel must not be measured on a last panel that its layer does not have
_NO_EPILOGUE: dict[str, Any] = {
    "has_bias": False,
    "activation": "none",
    "has_multiplier": False,
    "has_residual": False,
}
_NEARLY_THE_SAME = math.log(1.25)  # of rows that are measured, or lengths of attention
_SMALL = 64  # features of the product that brings a kernel's code into the caches
_WORTH_A_COPY = 0.97  # a packed weight must be this much faster than the plain one to be worth its memory
_WORTH_A_CALL = 0.97  # and another library's kernel this much faster than ours, which joins its neighbours in one call
_PARTED = 2  # calls of ours that Python makes for one of another library: the neighbours become two, ours takes none
_VIEWED = 3  # the same for attention of another library, which takes views of its operands and its result besides

Shape = LinearShape | AttentionShape
_OPERATORS: dict[str, type[LinearShape] | type[AttentionShape]] = {"linear": LinearShape, "attention": AttentionShape}


@dataclass(frozen=True)
class TuningRecord:
    """One decision and what it was measured from: seconds by kernel name."""

    shape: Shape
    threads: int
    kernel: str
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``tuning.jsonl``."""
        operator = next(name for name, kind in _OPERATORS.items() if isinstance(self.shape, kind))
        shape = {**asdict(self.shape), "dtype": str(self.shape.dtype).split(".")[-1]}
        return {"operator": operator, **asdict(self), "shape": shape}

    @staticmethod
    def from_json(data: dict[str, Any]) -> TuningRecord:
        """Inverse of :meth:`to_json`."""
        shape = {**data["shape"], "dtype": getattr(torch, data["shape"]["dtype"])}
        made = _OPERATORS[data["operator"]](**shape)
        return TuningRecord(made, int(data["threads"]), str(data["kernel"]), dict(data["seconds"]))


Records = dict[tuple[Shape, int], TuningRecord]  #: by shape and number of threads
#: What this process has measured. Two compilations of a model, or of it and a variant, run the same kernels.
DECIDED: Records = {}


class Tuner:
    """Decides kernels and remembers why.

    A kernel is measured as it will run in a model. Every layer's weight is read once a call, from memory rather than
    from a cache: ``others`` are tensors that are read between measurements, and the kernel's code, which runs in every
    layer, is brought back by a small product. And it has neighbours: two libraries in turn disturb each other, so that
    each kernel is measured between two products of the library that runs the rest.
    """

    def __init__(self, others: Sequence[Tensor] = (), decided: Records | None = None) -> None:
        """``decided`` holds decisions of other tuners, which are taken over and added to."""
        self._others = list(others)
        self.records: Records = {}
        self._decided: Records = {} if decided is None else decided

    def remember(self, lines: bytes) -> None:
        """Take over decisions made before, as ``to_jsonl`` wrote them. Those for kernels that do not run here, or made
        with another number of threads, are measured again."""
        for line in lines.splitlines():
            record = TuningRecord.from_json(json.loads(line))
            if record.kernel in _names(record.shape):
                self.records[(record.shape, record.threads)] = record

    def to_jsonl(self) -> bytes:
        """All decisions, a line each: an artifact's ``tuning.jsonl``."""
        return "".join(json.dumps(record.to_json()) + "\n" for record in self.records.values()).encode()

    def knows(self, shape: Shape) -> bool:
        """Whether the kernel for ``shape`` is decided, so that nothing is measured."""
        return self._known(shape) is not None

    def choose(self, shape: LinearShape, weight: Tensor) -> str:
        """The name of the kernel for ``shape``; measured with ``weight`` when it is not known yet."""
        return self._decide(shape, lambda: self._measure_linear(shape, weight))

    def choose_attention(self, shape: AttentionShape, sample: Callable[[], Sample]) -> str:
        """The name of the kernel for ``shape``; ``sample`` gives each on sample tensors where it is not known yet."""
        return self._decide(shape, lambda: self._measure_attention(shape, sample()))

    def _decide(self, shape: Shape, measure: Callable[[], tuple[str, dict[str, float]]]) -> str:
        known = self._known(shape)
        if known is None:
            key = shape, torch.get_num_threads()
            known = self._decided.get(key)
            if known is None or known.kernel not in _names(shape):
                with torch.random.fork_rng(devices=[]):  # operands are drawn, and a caller's numbers are the caller's
                    known = self._decided[key] = TuningRecord(*key, *measure())
                give_back()  # what it ran on
            self.records[key] = known
        return known.kernel

    def _known(self, shape: Shape) -> TuningRecord | None:
        return self.records.get((shape, torch.get_num_threads())) or self._nearest(shape)

    def _nearest(self, shape: Shape) -> TuningRecord | None:
        """What was measured for a shape that is nearly the same. Layers of a model whose tokens get fewer and fewer
        would each be measured, which takes long, and each by itself, so that they would differ by chance."""
        threads = torch.get_num_threads()
        near = {
            distance: record
            for record in self.records.values()
            if record.threads == threads and (distance := _distance(record.shape, shape)) <= _NEARLY_THE_SAME
        }
        return near[min(near)] if near else None

    def reads(self, others: Sequence[Tensor]) -> None:
        """Name the tensors that are read between measurements: a model's own weights, which cost no memory."""
        self._others = list(others)

    def _as_in_a_model(self, given: Mapping[str, Tensor]) -> None:
        """Caches as a layer finds them: other weights were read since its own, its activations just now."""
        read = 0
        for tensor in self._others:
            if read >= _LARGER_THAN_CACHES:
                break
            tensor.sum()
            read += tensor.numel() * tensor.element_size()
        for tensor in given.values():
            tensor.sum()

    def _measure_linear(self, shape: LinearShape, weight: Tensor) -> tuple[str, dict[str, float]]:
        names = applicable(shape)
        seconds: dict[str, float] = {}
        rows = _measured_rows(shape)
        columns = _MOST_NUMBERS // max(shape.in_features, rows, 1)
        weight = weight[: max(columns // _WHOLE_PANELS * _WHOLE_PANELS, _ENOUGH_COLUMNS)]
        shape = replace(shape, rows=rows, out_features=weight.shape[0])
        if len(names) > 1:
            given = _activations(shape)
            candidates = {name: _compiled(name, shape, weight, given) for name in names}
            runs = {name: run for name, run in candidates.items() if run is not None}
            small = replace(shape, in_features=_SMALL, out_features=_SMALL)
            others = _activations(small)
            square = torch.randn(_SMALL, _SMALL, dtype=torch.float32)
            rehearsals = {name: _compiled(name, small, square, others) for name in runs}
            seconds = _interleaved(dict(runs), lambda: self._as_in_a_model(given), _neighbour(shape), rehearsals)
            for run in runs.values():
                run.release()
        return _best(seconds, _PARTED * _call_seconds()), seconds

    def _measure_attention(self, shape: AttentionShape, sample: Sample) -> tuple[str, dict[str, float]]:
        """Keys and values come from the layer before: nothing is cold. A mask that calls make is made once for all
        sites that share it: each bears its part."""
        seconds = _interleaved(sample.runs)
        for name, taken in _interleaved(sample.makes).items():
            seconds[name] += taken / shape.sharing
        return _best(seconds, _VIEWED * _call_seconds()), seconds


def _best(seconds: Mapping[str, float], around: float) -> str:
    """The fastest kernel, unless ours or the plain one is nearly as fast: another library's costs ``around`` more in a
    model than by itself, beside ours."""
    best = min(seconds, key=lambda name: seconds[name]) if seconds else "plain"
    if seconds.get("plain", math.inf) <= seconds.get(best, 0.0) / _WORTH_A_COPY:
        return "plain"
    own = seconds.get("native", math.inf)
    return "native" if own - around <= seconds.get(best, 0.0) / _WORTH_A_CALL else best


def _names(shape: Shape) -> Sequence[str]:
    """The kernels that can run a shape here."""
    return applicable(shape) if isinstance(shape, LinearShape) else shape.kernels()


@dataclass
class _Candidate:
    """A kernel with operands to run it on."""

    module: fx.GraphModule
    operands: list[Tensor]

    def __call__(self) -> Tensor:
        with torch.no_grad():
            result: Tensor = self.module(*self.operands)
        return result

    def release(self) -> None:
        """Let go of the packed weight now: a graph module and its graph hold each other until the next collection,
        and copies of several shapes would pile up meanwhile."""
        self.module._buffers.clear()


def _activations(shape: LinearShape) -> dict[str, Tensor]:
    """Random operands of a layer, by name."""
    rows = shape.rows
    assert rows is not None
    sizes = {
        "x": (rows, shape.in_features),
        "bias": (shape.out_features,) if shape.has_bias else None,
        "multiplier": (rows, shape.out_features) if shape.has_multiplier else None,
        "residual": (rows, shape.out_features) if shape.has_residual else None,
    }
    return {name: torch.randn(size, dtype=shape.dtype) for name, size in sizes.items() if size is not None}


def _compiled(name: str, shape: LinearShape, weight: Tensor, given: Mapping[str, Tensor]) -> _Candidate | None:
    """The kernel on the operands ``given``; None when it cannot run here."""
    graph, root = fx.Graph(), torch.nn.Module()
    nodes: dict[str, Any] = dict.fromkeys(("x", "bias", "multiplier", "residual"))
    nodes |= {key: graph.placeholder(key) for key in given}
    emit = Emitter(root, graph)
    operands = Operands(weight=weight, activation=shape.activation, rows=shape.rows, hint="w", **nodes)
    try:
        graph.output(KERNELS[name](emit, operands))
        run = _Candidate(fx.GraphModule(root, graph), list(given.values()))
        run()
    except RuntimeError:  # oneDNN says so when it has no kernel for a type or shape on this machine
        return None
    return run


def _neighbour(shape: LinearShape) -> Callable[[], Any] | None:
    """A packed product with a small weight of its own, of the library that runs what lies between linear layers: ours,
    else oneDNN; None where there is neither."""
    rows = min(shape.rows or _NEIGHBOUR_ROWS, _NEIGHBOUR_ROWS)
    x, weight = (torch.randn(size, _NEIGHBOUR, dtype=torch.float32) for size in (rows, _NEIGHBOUR))
    beside = replace(shape, in_features=_NEIGHBOUR, out_features=_NEIGHBOUR, **_NO_EPILOGUE)
    name = next((name for name in ("native", "onednn") if name in applicable(beside)), None)
    return None if name is None else _compiled(name, beside, weight, {"x": x})


def _call_seconds() -> float:
    """Seconds that a call of our kernel takes beside what it computes: that of a small product, which computes nothing
    to speak of. It is Python's work, so that it depends on the machine and on what else that does."""
    call = None if NATIVE.missing() else _small_call()
    if call is None:
        return 0.0
    return best_in_turn(["call"], lambda _: _seconds_of(call), _SECONDS_PER_SHAPE)["call"]


@functools.cache
def _small_call() -> Callable[[], Any] | None:
    shape = LinearShape(1, _SMALL, _SMALL, torch.float32)
    return _compiled("native", shape, torch.randn(_SMALL, _SMALL, dtype=torch.float32), _activations(shape))


def _seconds_of(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _interleaved(
    runs: Mapping[str, Callable[[], Any]],
    prepare: Callable[[], None] = lambda: None,
    neighbour: Callable[[], Any] | None = None,
    rehearsals: Mapping[str, Callable[[], Any] | None] = MappingProxyType({}),
) -> dict[str, float]:
    """Best seconds of each, called in turn until the time is used up: noise then hits all alike. What the neighbour
    loses by coming after a kernel counts as the kernel's own time.

    A result is held until the next: were it freed at once, the C library might give its pages back, and each call would
    be measured with the faults that bring them again. In a model they are there."""
    beside = neighbour or (lambda: None)
    alone = float("inf")
    held = None
    for run in runs.values():
        held = run()

    def seconds(name: str) -> float:
        nonlocal alone, held
        prepare()
        (rehearsals.get(name) or beside)()
        beside()
        started = time.perf_counter()
        beside()
        alone = min(alone, time.perf_counter() - started)
        started = time.perf_counter()
        held = runs[name]()
        beside()
        return time.perf_counter() - started

    best = best_in_turn(runs, seconds, _SECONDS_PER_SHAPE)
    return {name: max(taken - alone, 1e-9) for name, taken in best.items()}


def _measured_rows(shape: LinearShape) -> int:
    """With how many rows a layer is measured."""
    most = max(_MOST_PRODUCTS // max(shape.in_features * shape.out_features, 1), _ENOUGH_ROWS)
    return min(shape.rows or _UNKNOWN_ROWS, most)


def _distance(known: Shape, wanted: Shape) -> float:
    """How far two shapes are apart that differ in rows or lengths alone, as the log of the ratio; infinite for
    others."""
    if isinstance(known, LinearShape) and isinstance(wanted, LinearShape):
        alike = replace(known, rows=wanted.rows) == wanted
        pairs = [(_measured_rows(known), _measured_rows(wanted))]
    elif isinstance(known, AttentionShape) and isinstance(wanted, AttentionShape):
        alike = replace(known, length=wanted.length, keys=wanted.keys) == wanted
        pairs = [(known.length, wanted.length), (known.keys, wanted.keys)]
    else:
        return math.inf
    if not alike or any(min(pair) < 1 for pair in pairs):
        return math.inf
    return max(abs(math.log(one / other)) for one, other in pairs)
