"""From a captured program to something that runs: passes, lowering, and the comparison with the original model."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils._pytree import tree_leaves, tree_unflatten

from regraft.aliasing import separate_outputs
from regraft.errors import CaptureError
from regraft.guard import SymbolicGuard, leaf_order
from regraft.ir.capture_error import first_line
from regraft.ir.driver import Session
from regraft.ir.memory import give_back, no_cycle_search, page_out
from regraft.ir.ops.gather import collective_calls
from regraft.ir.program import Program
from regraft.ir.records import Log
from regraft.ir.verify import Checked, relative_l2
from regraft.reference import Reference
from regraft.tolerance import tolerance

if TYPE_CHECKING:
    from regraft.experts import Together

_LOG = logging.getLogger("regraft")
_OTHER_SEED = 0x5EED  # combined with the caller's own: no seed of the caller's is met by chance

Executable = Callable[..., Sequence[Any]]


class Passes(Protocol):
    """What a pipeline is to the face: it rewrites a program in place and returns seconds by pass."""

    def run(self, program: Program, session: Session) -> dict[str, float]:
        """Rewrite ``program``."""
        ...


def _default_pipeline(target: str) -> Passes:
    from regraft.passes.pipeline import default_pipeline

    return default_pipeline(target)


def _default_lower(program: Program, session: Session) -> Executable:
    if session.target != "cpu":
        from regraft.codegen.triton.lower import lower as lower_for_gpu
        from regraft.codegen.triton.tuner import KernelTuner

        kernels = KernelTuner.of(program, session.target, session.tuning, session.measures)
        return lower_for_gpu(program, session.log, kernels)
    from regraft.codegen.cpu.lower import lower
    from regraft.codegen.cpu.tuning import DECIDED, Tuner

    tuner = Tuner(decided=DECIDED)
    tuner.remember(session.tuning)
    return lower(program, tuner, session.read_last)


@dataclass(frozen=True)
class Toolchain:
    """The two steps behind capture. ``pipeline(target)`` gives the passes; ``lower(program, session)`` gives a
    function of the flat user inputs that returns the program's flat outputs, mutated buffers first. That function
    reads buffers that the program mutates from their own memory at each call."""

    pipeline: Callable[[str], Passes] = _default_pipeline
    lower: Callable[[Program, Session], Executable] = _default_lower


class Entry:
    """Code for one set of input shapes: takes the leaves of a call, returns the user's output structure.

    Buffers and inputs that the model mutates are written back after each run.
    """

    def __init__(self, program: Program, executable: Executable) -> None:
        self.program = program
        self.executable = executable
        self.recorded: Executable | None = None  # a CUDA graph of it, which runs in its place
        self.structure, order = leaf_order(program.in_spec)
        self.guard = SymbolicGuard(program)
        self.symbolic = self.guard.symbolic
        self.used = 0
        self._order = order if order != list(range(len(order))) else None
        self._lock = threading.Lock()
        self._written: list[tuple[int, Tensor]] = []
        self._inputs_written: list[tuple[int, int]] = []
        self._picked: list[tuple[int, Any]] = []
        self._out_spec = program.out_spec
        self._read_outputs(program)

    @property
    def mutated(self) -> list[Tensor]:
        """The buffers that runs write to."""
        return [buffer for _, buffer in self._written]

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword inputs of the kind that the code was built for."""
        args, kwargs = tree_unflatten(self.program.example, self.program.in_spec)
        return tuple(args), dict(kwargs)

    def ordered(self, leaves: list[Any]) -> list[Any]:
        """The leaves of a call in the program's order."""
        return leaves if self._order is None else [leaves[place] for place in self._order]

    def shares_written_memory(self, leaves: list[Any]) -> bool:
        """Whether an input that the model writes to shares memory with another one: code takes them for two."""
        if not self._inputs_written:
            return False
        leaves = self.ordered(leaves)
        tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        storages = {place: leaf.untyped_storage()._cdata for place, leaf in tensors}
        written = [storages[place] for _, place in self._inputs_written]
        return any(list(storages.values()).count(storage) > 1 for storage in written)

    def __call__(self, leaves: list[Any]) -> Any:
        leaves = self.ordered(leaves)
        run = self.recorded or self.executable
        with torch.no_grad():
            if self.writes:
                with self._lock:  # reading the state and writing the next must not mix with another thread's
                    outputs = run(*leaves)
                    for position, buffer in self._written:
                        buffer.copy_(outputs[position])
                    for position, place in self._inputs_written:
                        leaves[place].copy_(outputs[position])
            else:
                outputs = run(*leaves)
        return self.presented(outputs)

    @property
    def writes(self) -> bool:
        """Whether runs write to buffers or inputs."""
        return bool(self._written or self._inputs_written)

    def presented(self, outputs: Sequence[Any]) -> Any:
        """The user's output structure, of the flat outputs of a run."""
        kept = [constant if position < 0 else outputs[position] for position, constant in self._picked]
        return tree_unflatten(kept, self._out_spec)

    def _read_outputs(self, program: Program) -> None:
        places = {node.name: place for place, node in enumerate(program.user_inputs())}
        for position, spec in enumerate(program.signature.output_specs):
            if spec.kind == OutputKind.BUFFER_MUTATION and spec.target is not None:
                self._written.append((position, program.weights.originals[spec.target]))
            elif spec.kind == OutputKind.USER_INPUT_MUTATION and spec.target is not None:
                self._inputs_written.append((position, places[spec.target]))
            elif isinstance(spec.arg, ConstantArgument):
                self._picked.append((-1, spec.arg.value))
            else:
                self._picked.append((position, None))


@dataclass(frozen=True)
class Answer:
    """The output of the call that led to a compilation: computed to be compared with the original's."""

    entry: Entry
    output: Any


def copied_entry(entry: Entry, toolchain: Toolchain, target: str, memo: dict[int, Any]) -> Entry:
    """The same code over copies of its weights, lowered anew with the kernels that were chosen before."""
    program = entry.program.copy()
    program.weights.originals = copy.deepcopy(program.weights.originals, memo)  # tied weights stay tied
    tuning = getattr(entry.executable, "tuning", b"")
    session = Session(verify="off", target=target, tuning=tuning, measures=False)
    return Entry(program, toolchain.lower(program, session))


@dataclass
class Build:
    """One compilation on its way: what was done, how long it took, what came out.

    ``before`` is a copy of the captured program (its graph; tensors are shared). ``drift`` is the relative L2
    error against the original on the example inputs, None when that was not asked for; where it is too large,
    ``captured_drift`` is that of the captured program before any rewrite. ``repetitions`` counts the checks that were
    not computed because they are the same as earlier ones, other parameters aside. ``outputs`` are the flat outputs on
    the example inputs, where they were computed to be compared: the call that asked for the compilation needs no other.
    ``beside`` is code for sizes that ``entry`` is not for.
    """

    entry: Entry
    before: Program
    log: Log
    phases: dict[str, float] = field(default_factory=dict)
    repetitions: int = 0
    drift: float | None = None
    tolerance: float | None = None
    captured_drift: float | None = None
    outputs: Sequence[Any] | None = None
    beside: Entry | None = None

    @property
    def accepted(self) -> bool:
        """Whether the drift keeps the tolerance (NaN does not)."""
        return self.drift is None or self.tolerance is None or self.drift <= self.tolerance

    @property
    def why_refused(self) -> str:
        """What to tell about an output that is too far from the model's own, and what to do."""
        if self.captured_drift is not None and not self.captured_drift <= (self.tolerance or 0.0):
            return (
                f"what torch.export captured is {self.captured_drift:.1e} away from the model's own output "
                f"(tolerance {self.tolerance:.0e}) before any rewrite: the model computes something else while it is "
                "captured, or draws random numbers; compile the part of it that does not"
            )
        return (
            f"the compiled output is {self.drift:.1e} away from the model's own (tolerance {self.tolerance:.0e}); "
            "run `regraft bisect` to find the rewrite"
        )


def build(
    program: Program,
    target: str,
    verify: str,
    toolchain: Toolchain,
    reference: Reference | None,
    together: Together | None = None,
    read_last: Callable[[Tensor], Any] = page_out,
) -> Build:
    """Rewrite and lower ``program``; ``reference`` is the original's output on the example inputs, None for a lossy
    program, which is not compared as a whole; ``read_last`` is the lowering's, and lets go of memory. Where checks
    stood for others and the whole is off, all is done once more with every check computed.

    One rank's program is compared with the original only where its ranks compile it ``together``: each on its own
    example, and the drift is that of the worst. Raises whatever a pass or the lowering raises, and ``PeerError``.
    """
    before = program.copy()
    session = Session(verify=verify, target=target, read_last=read_last)
    made = _build(program, before, target, session, toolchain, reference, together)
    if made.repetitions and not made.accepted and together is None:
        _LOG.warning("the compiled output is off, and some checks stood for others: compiling again, computing all")
        session = Session(verify=verify, target=target, checked=Checked(reused=False), read_last=read_last)
        made = _build(before.copy(), before, target, session, toolchain, reference, None)
    return made


def _build(
    program: Program,
    before: Program,
    target: str,
    session: Session,
    toolchain: Toolchain,
    reference: Reference | None,
    together: Together | None,
) -> Build:
    with no_cycle_search():
        phases = dict(toolchain.pipeline(target).run(program, session))
        separate_outputs(program, before)
        expected, parts, seconds = None, None, 0.0
        if session.verify == "off" or (together is None and collective_calls(program.graph)):
            reference = None
        if reference is not None:  # before weights are packed: a run of the model needs room of its own
            started = time.perf_counter()
            give_back()  # what the checks left
            parts = reference.in_parts(before) if together is None else None
            expected = parts if parts is not None else reference()
            give_back()
            seconds = time.perf_counter() - started
        started = time.perf_counter()
        executable = toolchain.lower(program, session)
        phases["lowering"] = time.perf_counter() - started
    give_back()
    result = Build(Entry(program, executable), before, session.log, phases, session.checked.repetitions)
    if together is not None:
        together.agree(program)
    if reference is not None:
        started = time.perf_counter()
        with together.running() if together is not None else nullcontext():
            outputs = _outputs(program, executable)
        result.tolerance = tolerance(before, tree_leaves(expected))
        result.drift = _drift(program.user_outputs(outputs), expected)
        if parts is not None and not result.accepted:  # perhaps the batch may not be divided
            expected = reference()
            result.drift = _drift(program.user_outputs(outputs), expected)
        if together is None and not result.entry.writes:
            result.outputs = outputs
        if together is not None:
            result.drift = together.worst(result.drift)
        if not result.accepted:
            captured = before.user_outputs(_outputs(before, before.callable()))
            result.captured_drift = _drift(captured, expected)
        phases["verification"] = seconds + time.perf_counter() - started
        del expected, outputs, parts
        give_back()  # the first call is next
    return result


def _outputs(program: Program, executable: Executable) -> Sequence[Any]:
    with torch.no_grad():
        return executable(*program.example)


def _drift(outputs: Any, expected: Any) -> float:
    """The largest relative L2 error of outputs; infinite where they are of another kind."""
    wanted, given = tree_leaves(expected), tree_leaves(outputs)
    if len(wanted) != len(given):
        return float("inf")
    drift = 0.0
    for left, right in zip(given, wanted, strict=True):
        if isinstance(right, Tensor) and isinstance(left, Tensor):
            drift = max(drift, relative_l2(left, right)) if left.dtype == right.dtype else float("inf")
        elif not (left is right or left == right):
            return float("inf")
    return drift


def output_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The model's own output; its buffers, the inputs and the state of the random generator stay as they are. It draws
    from another seed than the compiled code it is compared with: where it draws, outputs differ, and do so always."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.initial_seed() ^ _OTHER_SEED)
        copied_args, copied_kwargs = _copied((args, dict(kwargs)))
        return torch.func.functional_call(model, buffers, copied_args, copied_kwargs)


def own_output(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's own output; what is wrong with the inputs may show only here, because export runs no kernel."""
    try:
        return output_of(model, args, kwargs)
    except Exception as error:  # a model may raise anything
        raise CaptureError(
            f"{type(model).__name__} itself fails on the example inputs ({first_line(error)}); "
            "give inputs that it accepts"
        ) from error


def _copied(inputs: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
