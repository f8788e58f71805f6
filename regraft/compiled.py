"""The compiled model: the original's signature, code for the shapes it was built for, and the original for
the rest."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from regraft.build import Answer, Build, Entry, build, copied_entry, own_output
from regraft.cuda_graphs import graphed
from regraft.errors import ArtifactError, CaptureError, InputError, RegraftError
from regraft.gate import CAPTURE, gate_of
from regraft.guard import UnsupportedInput, describe, describe_call, flatten_call, key_of
from regraft.ir.capture import capture
from regraft.ir.capture_error import first_line
from regraft.ir.errors import FailedAssertion
from regraft.ir.memory import no_cycle_search, page_out
from regraft.kernels import notes_of
from regraft.options import Options
from regraft.parking import Parking, empty
from regraft.reference import Reference
from regraft.stand_in import StandIn
from regraft.surroundings import has_modes, obstacle, refuse_export
from regraft.watch import WeightWatch

if TYPE_CHECKING:
    from regraft.budget import Spending
    from regraft.experts import Together
    from regraft.report.model import Report

_LOG = logging.getLogger("regraft")
_RETURNS_BEFORE_EVICTION = 16  # a shape beyond the limit that keeps coming is worth another capture
_KEYS_REMEMBERED = 4096
_EVENTS_REMEMBERED = 256
_CALLS_OF_USE = 4  # code that serves fewer calls before the model changes was not worth compiling …
_RESTLESS = 8  # … and this often in a row, the model is left alone until it rests


class CompiledModule(StandIn):
    """A model compiled for inference; call it as you would call the model.

    It is an ``nn.Module``, so that it can stand in a larger one. It has no weights of its own: ``parameters``,
    ``state_dict``, ``to`` and unknown attributes (``config``…) are the original's. Outputs carry no gradient.

    A call whose structure, shapes, element types, devices and scalars were seen before runs compiled code. Another
    one is captured, up to ``maximum_entries``; beyond that the original runs, until a shape has come back often
    enough to take the place of the least recently used. The original also runs in training mode, under autocast, under
    another default element type, while its operators are recorded or transformed (torch.jit, torch.func), when an input
    wants a gradient, where what the model asserts of its values does not hold, and for what cannot be captured. Each of
    these is logged once (logger "regraft") and is an event in ``report``. Weights that changed since compilation lead
    to a new compilation.
    Without the original (loaded, or freed) such calls raise ``InputError``.
    """

    def __init__(self, model: nn.Module | ExportedProgram | None, options: Options, report: Report) -> None:
        super().__init__()
        exported = isinstance(model, ExportedProgram)
        self.training = False
        self.__dict__["_source"] = model  # not registered: neither is a part of this module
        self.__dict__["_original"] = model.module() if isinstance(model, ExportedProgram) else model
        self._recapture = model is not None and not exported
        self._has_modes = has_modes(model)
        self._freed = False
        self._options = options
        self._report = report
        self._latest: Build | None = None
        self._device = options.target.partition(":")[0]
        self._lock = threading.RLock()
        self._clock = itertools.count(1)
        self._watch: WeightWatch | None = None
        self._parking: Parking | None = None
        self._told: set[str] = set()
        self._met = False  # whether the ranks have compiled together
        self._default_dtype = torch.get_default_dtype()  # what the model makes of numbers alone has this type
        self._restless = 0  # compilations in a row that were of use for a few calls only
        self._forget()
        self.__dict__["_closed"] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; raises ``InputError`` where the original would have to run and is not there."""
        reason = self._state_reason()
        if reason:
            return self._run_original(reason, args, kwargs)
        try:
            structure, leaves = flatten_call(args, kwargs)
        except UnsupportedInput as error:
            return self._run_original(str(error), args, kwargs)
        if torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            return self._run_original("an input requires a gradient, and compiled code gives none", args, kwargs)
        if self._watch is not None and self._watch.changed():
            self._weights_changed()
        key = key_of(structure, leaves, self._by_strides)
        entry = self._seen.get(key)
        if entry is None:
            found = self._find(key, structure, leaves, args, kwargs)
            if isinstance(found, str):
                return self._run_original(found, args, kwargs)
            if isinstance(found, Answer):
                found.entry.used = next(self._clock)
                return found.output
            entry = found
        if entry.shares_written_memory(leaves):
            return self._run_original("an input that the model writes to shares memory with another", args, kwargs)
        entry.used = next(self._clock)
        try:
            return entry(leaves)
        except FailedAssertion as failed:
            return self._run_original(f"what the model asserts does not hold in compiled code ({failed})", args, kwargs)

    @property
    def report(self) -> Report:
        """What fired, what was refused, and what happened since; that of the latest compilation."""
        self._fill_operators()
        return self._report

    @property
    def entries(self) -> list[Entry]:
        """The compiled code that is held, one entry a capture."""
        return list(self._entries)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture and compile for these inputs now; raises ``CaptureError`` when that cannot be done."""
        try:
            structure, leaves = flatten_call(args, kwargs)
        except UnsupportedInput as error:
            raise CaptureError(f"{error}; give such inputs instead") from error
        key = key_of(structure, leaves, self._by_strides)
        with self._lock, self._parked():
            self._compile(key, args, dict(sorted(kwargs.items())), self._options.dynamic)

    @contextmanager
    def _parked(self) -> Iterator[None]:
        """Weights of a model that is to be let go of give way to their packed copies; all come back where nothing was
        compiled."""
        if self._options.free_original and self.original is not None:
            self._parking = Parking(self.original)
        try:
            yield
        finally:
            if self._parking is not None:
                if self._parking.refused:
                    self._event("memory", self._parking.refused)
                if not self._entries:
                    self._parking.take_back()
                self._parking.close()
                self._parking = None

    def install(self, entry: Entry) -> None:
        """Take over an entry that was compiled elsewhere (an artifact's)."""
        if self._options.cuda_graphs:
            entry.recorded = graphed(entry.program, entry.executable, partial(self._event, "cuda graph"))
        self._entries.append(entry)
        self._by_strides |= entry.program.reads_layout

    def free_original(self) -> None:
        """Let go of the original's weights: compiled code holds what it needs. The original can no longer run,
        nothing can be recaptured, and ``save`` is no longer possible."""
        if self.original is None or self._freed:
            return
        if not self._entries:
            raise InputError(
                "free_original needs compiled code, and nothing is compiled yet; give example inputs to compile()"
            )
        kept = {id(buffer) for entry in self._entries for buffer in entry.mutated}
        empty(self.original, kept)
        for entry in self._entries:
            stored = entry.program.weights.originals
            entry.program.weights.originals = {n: t for n, t in stored.items() if id(t) in kept}
        self._latest, self._watch = None, None
        self._captured.clear()
        self.__dict__["_source"] = None
        self._freed, self._recapture = True, False

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what a budget was spent on, else the entry used last, as an artifact; raises ``ArtifactError``."""
        from regraft.artifact import save
        from regraft.kernels import kernel_members

        if self._freed:
            raise ArtifactError(f"{path} was not saved: the original's weights were freed; save before freeing them")
        if not self._entries:
            raise ArtifactError(f"{path} was not saved: nothing is compiled yet; call the model once, then save")
        latest = max(self._entries, key=lambda held: held.used)
        entry = next((held for held in self._entries if held is self._spent), latest)
        if len(self._entries) > 1:
            _LOG.warning("code for %d shapes is held; that of a budget, else the latest, is saved", len(self._entries))
        tuning = getattr(entry.executable, "tuning", b"")  # loading measures nothing, and picks the same kernels
        members = kernel_members(entry.executable) | ({"tuning.jsonl": tuning} if tuning else {})
        if self._options.experts is not None:
            members["plan.json"] = self._options.experts.sharding.plan.to_json().encode()
        save(path, entry.program, report=self.report.to_json(), target=self._options.target, members=members)

    # What follows serves calls that are not the common case.

    def _state_reason(self) -> str:
        """Why the original must run whatever the inputs are."""
        original = self.__dict__["_original"]
        if original is not None and original.training and self._recapture and self._has_modes:
            return "the model is in training mode; call eval() on it"
        default = self._default_dtype if self._entries and self._recapture else None
        return obstacle(self._device, default, modes=original is not None and not self._freed)

    def _find(
        self, key: Hashable, structure: Hashable, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Entry | Answer | str:
        with self._lock:
            for entry in self._entries:
                if entry.structure == structure and entry.guard.fits(entry.ordered(leaves)):
                    self._remember(key, entry)
                    return entry
            if not self._recapture:
                return f"no code for inputs {describe_call(args, kwargs)}"
            if key in self._refused:
                return self._refused[key]
            return self._capture_call(key, args, dict(sorted(kwargs.items())), describe(leaves))

    def _capture_call(
        self, key: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any], shown: str
    ) -> Entry | Answer | str:
        if self._restless >= _RESTLESS:
            self._restless -= 1
            self._watch_weights()
            return "the model changed at nearly every call; it is compiled again when it rests"
        if len(self._entries) >= self._options.maximum_entries:
            if len(self._waiting) >= _KEYS_REMEMBERED:
                self._waiting.clear()
            returns = self._waiting[key] = self._waiting.get(key, 0) + 1
            if returns < _RETURNS_BEFORE_EVICTION and not self._options.sharded:
                return (
                    f"code for {len(self._entries)} shapes is held, which is the limit, and inputs {shown} have "
                    "another; compile with dynamic=True"
                )
            self._evict()
        if self._entries:
            self._event("recapture", f"inputs {shown} have a new shape, type or value")
        try:
            return self._compile(key, args, kwargs, self._options.dynamic if not self._entries else None)
        except CaptureError as error:
            if self._options.dynamic is not None and not self._entries:
                self._event("fallback", f"captured at the sizes of the call: {error}")
                try:
                    return self._compile(key, args, kwargs, None)
                except CaptureError as second:
                    error = second
            return self._refuse(key, str(error), tell=False)

    def _compile(
        self, key: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
    ) -> Entry | Answer | str:
        model = self.original
        assert self._source is not None and model is not None
        own_types = torch.autocast(self._device, enabled=False)  # what code is compiled for
        with CAPTURE, no_cycle_search(), own_types, gate_of(model).capturing() as alone:
            if not alone:
                return "another thread runs the original, which must rest while it is captured"
            experts = self._options.experts
            if experts is None or not experts.together or self._met:
                return self._compile_alone(model, key, args, kwargs, dynamic)
            self._met = True  # later captures are this rank's own: the others know nothing of them
            with experts.meeting(self._options.verify) as together:
                return self._compile_alone(model, key, args, kwargs, dynamic, together)

    def _compile_alone(
        self,
        model: nn.Module,
        key: Hashable,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dynamic: Any,
        together: Together | None = None,
    ) -> Entry | Answer | str:
        started = time.perf_counter()
        program = capture(self._source, args, kwargs, dynamic)
        captured = {id(tensor): tensor for tensor in program.weights.originals.values()}
        seconds = time.perf_counter() - started
        reference = Reference(partial(own_output, model), args, kwargs)
        try:
            made = build(
                program,
                self._options.target,
                self._options.verify,
                self._options.toolchain,
                reference,
                together,
                page_out if self._parking is None else self._parking.park,
            )
        except RegraftError:
            raise
        except FailedAssertion as failed:
            return self._refuse(key, f"what the model asserts does not hold on the example inputs ({failed})")
        except Exception as error:  # a fault of ours must not take the model away
            _LOG.debug("compilation failed", exc_info=True)
            return self._refuse(key, f"compilation failed ({first_line(error)}); please report it")
        if made.accepted and self._options.spending is not None:
            made = self._spend(self._options.spending, made, model, describe_call(args, kwargs))
        if made.accepted and self._options.unpad is not None:
            self._event("unpadding", self._options.unpad(made, self._options, reference))
        outputs, made.outputs = made.outputs, None  # not to be held for the report
        self._take_report(made, seconds)
        for note in notes_of(made.entry.executable):
            self._event("tuning", note)
        for reason in self._options.experts.refused(made.log) if self._options.experts is not None else ():
            self._event("placement", reason)
        if not made.accepted:
            return self._refuse(key, made.why_refused)
        self._default_dtype = torch.get_default_dtype()
        self.install(made.entry)
        if made.beside is not None:
            self.install(made.beside)
        self._remember(key, made.entry)
        self._captured |= captured
        if self._parking is None:  # else the weights are about to go, and a look would bring them back into memory
            self._watch_weights()
        return made.entry if outputs is None else Answer(made.entry, made.entry.presented(outputs))

    def _spend(self, spending: Spending, exact: Build, model: nn.Module, inputs: str) -> Build:
        """The model within the accuracy budget; the exact one, and why, where there is none."""
        from regraft.budget import spend

        made, told = spend(spending, exact, model, self._options.target, self._options.verify)
        told = replace(told, inputs=inputs)
        if self._report.budget is None or not self._report.budget.stands_beside(told):
            self._report.budget = told
            self._spent = made.entry if told.spent else None
        if told.refused:
            self._event("budget", f"{told.refused}; the model is the exact one")
        elif told.covers:
            self._event("budget", told.covers)
        return made

    def _refuse(self, key: Hashable, reason: str, tell: bool = True) -> str:
        if self._options.sharded:
            raise CaptureError(f"{reason}; the experts are sharded, so that this rank cannot run the model by itself")
        if len(self._refused) >= _KEYS_REMEMBERED:
            self._refused.clear()
        self._refused[key] = reason
        self._watch_weights()  # a model that changes gets another chance
        if self._options.spending is not None and self._report.budget is None:
            self._report.budget = self._options.spending.unspent(reason)
        if tell:
            self._event("fallback", reason)
        return reason

    def _remember(self, key: Hashable, entry: Entry) -> None:
        if len(self._seen) >= _KEYS_REMEMBERED:
            self._seen.clear()
        self._seen[key] = entry

    def _evict(self) -> None:
        oldest = min(self._entries, key=lambda entry: entry.used)
        self._entries.remove(oldest)
        for key in [key for key, entry in self._seen.items() if entry is oldest]:
            del self._seen[key]
        self._waiting.clear()

    def _forget(self) -> None:
        self._entries: list[Entry] = []
        self._seen: dict[Hashable, Entry] = {}
        self._refused: dict[Hashable, str] = {}
        self._waiting: dict[Hashable, int] = {}
        self._by_strides = False  # whether a program holds for the strides of its inputs only
        self._since = next(self._clock)
        self._spent = None  # what the report's budget is of, where it is not exact
        self._captured: dict[int, Tensor] = {}  # the model's own tensors that entries read, by identity

    def _weights_changed(self) -> None:
        with self._lock:
            what = self._watch.changed() if self._watch is not None else ""  # a capture changes some for a while
            if what:
                short = next(self._clock) - self._since < _CALLS_OF_USE
                self._restless = self._restless + 1 if short else 0
                self._event("relowering", f"{what}; compiled anew")
                self._forget()
                self._watch = None

    def _watch_weights(self) -> None:
        mutated = [buffer for entry in self._entries for buffer in entry.mutated]
        self._watch = WeightWatch(self.original, self._captured.values(), mutated)

    def _run_original(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._options.sharded:
            raise InputError(f"{reason}, and with its experts sharded this rank cannot run the model by itself")
        refuse_export()
        model = self.original
        if model is None or self._freed or (not self._recapture and reason.startswith("no code")):
            why = "its weights were freed" if self._freed else "there is no original to run instead"
            raise InputError(f"{reason}, and {why}; {self._advice()}")
        self._event("fallback", reason)
        with gate_of(model).running():
            return model(*args, **kwargs)

    def _advice(self) -> str:
        built = "; ".join(describe_call(*entry.example) for entry in self._entries)
        return f"give inputs like those it was compiled for: {built}, or compile the model for these"

    def _event(self, kind: str, reason: str) -> None:
        text = f"{kind}: {reason}"
        if text in self._told or len(self._told) >= _EVENTS_REMEMBERED:
            return
        self._told.add(text)
        _LOG.warning("%s", text)
        self._report.record(kind, reason)

    def _take_report(self, made: Build, capture_seconds: float) -> None:
        self._report.log = made.log
        self._report.phases = {"capture": capture_seconds, **made.phases}
        self._report.end_to_end_drift, self._report.tolerance = made.drift, made.tolerance
        self._latest = made

    def _fill_operators(self) -> None:
        """Rows by operator cost seconds on a large model, and most reports are never read."""
        if self._latest is None:
            return
        from regraft.ir.device import rated_device
        from regraft.report.build import environment, main_dtype, operator_rows

        made, self._latest = self._latest, None
        device = rated_device(self._options.target)
        self._report.operators_before = operator_rows(made.before.graph, device)
        self._report.operators_after = operator_rows(made.entry.program.graph, device)
        self._report.environment = environment(device, main_dtype(made.before.graph))

    def _loadable(self) -> nn.Module:
        if self._freed:
            raise InputError("the original's weights were freed; compile the model again with the new ones")
        return super()._loadable()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        """A copy of the model, compiled at its first call; one that was loaded keeps its code."""
        if self._freed:
            raise InputError("the original's weights were freed, so that the model cannot be copied; load it twice")
        report = type(self._report)(model=self._report.model, target=self._report.target)
        twin = CompiledModule(copy.deepcopy(self._source, memo), self._options, report)
        if self.original is None:
            for entry in self._entries:
                twin.install(copied_entry(entry, self._options.toolchain, self._options.target, memo))
        return twin
