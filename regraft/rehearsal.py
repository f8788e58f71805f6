"""Models with some lossy rewrites, built to be tried: run on calibration data, timed beside the exact one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regraft.build import Entry, Executable, Passes, output_of
from regraft.calibration import Calibration, Call, leaves_of
from regraft.codegen.cpu.linear_kernels import LinearShape, applicable
from regraft.codegen.cpu.lower import lower
from regraft.codegen.cpu.tuning import Tuner
from regraft.ir.cost import node_cost
from regraft.ir.driver import Session
from regraft.ir.memory import give_back, no_cycle_search
from regraft.ir.program import Program
from regraft.passes.budget.budget import Budget
from regraft.passes.budget.candidate import Composition, rewrites
from regraft.passes.budget.errors import BudgetError
from regraft.passes.budget.metric import losses
from regraft.passes.budget.trials import Array

_LOG = logging.getLogger("regraft")
_TURN = 0.02  # seconds that a turn of short calls lasts
_QUICK, _THOROUGH = (1.5, 7, 21), (2.0, 9, 31)  # seconds for all turns, the fewest and the most turns
_PART = 0.04  # of a budget's seconds that one quick timing may take
_LOWERED = 0.3  # seconds of the exact model's calls from which on a model is lowered to be tried


class NearestTuner(Tuner):
    """Takes the kernel of a layer that is the same but for its number of rows, where those are alike: schedules differ
    in little else, and measuring each would take longer than the schedules themselves."""

    def choose(self, shape: LinearShape, weight: Tensor) -> str:
        known = [
            (abs(math.log(other.rows / shape.rows)), record.kernel)
            for (other, threads), record in self.records.items()
            if isinstance(other, LinearShape) and other.rows and shape.rows
            if threads == torch.get_num_threads() and replace(other, rows=shape.rows) == shape
        ]
        distance, kernel = min(known, default=(math.inf, ""))
        if distance <= math.log(2) and kernel in applicable(shape):
            return kernel
        return super().choose(shape, weight)


class Rehearsal:
    """Builds compositions of lossy rewrites over one recognised program; see ``passes/budget/trials.py``.

    ``entry`` is the exact model's. The references are the original's own outputs.
    """

    def __init__(
        self,
        recognised: Program,
        finish: Passes,
        entry: Entry,
        model: nn.Module,
        calibration: Calibration,
        budget: Budget,
    ) -> None:
        self._recognised, self._finish, self._entry, self._budget = recognised, finish, entry, budget
        self._calls = [leaves_of(call, entry) for call in calibration.calls]
        self._held_out = [leaves_of(call, entry) for call in calibration.held_out]
        self._references = [_reference(model, call) for call in calibration.calls]
        self._held_references = [_reference(model, call) for call in calibration.held_out]
        self.example = list(entry.program.example)
        self._tuner = NearestTuner()
        self._tuner.remember(getattr(entry.executable, "tuning", b""))
        self._lowered: tuple[Composition, Executable] | None = None
        self.exact_seconds = _seconds(lambda: entry.executable(*self.example))

    @property
    def batches(self) -> int:
        """Number of batches to calibrate with."""
        return len(self._calls)

    def losses(self, composition: Composition, batches: int | None = None) -> Array:
        """By the lowered model where many batches or large ones make up for lowering, else operator by operator."""
        number = self.batches if batches is None else max(1, min(batches, self.batches))
        run = self._run(composition, number)
        if run is None:
            return np.array([math.inf])
        return self.losses_of(run, self._calls[:number], self._references[:number])

    def _run(self, composition: Composition, number: int) -> Callable[..., Any] | None:
        if not composition:
            return self._entry.executable
        if number * self.exact_seconds > _LOWERED:
            return self.executable(composition)
        program = self._rewritten(composition)
        return None if program is None else program.callable()

    def held_out(self, composition: Composition) -> Array:
        """By the lowered model."""
        executable = self.executable(composition)
        return np.array([math.inf]) if executable is None else self.held_out_by(executable)

    def held_out_by(self, executable: Executable) -> Array:
        """The losses of a finished model on the data held out."""
        return self.losses_of(executable, self._held_out, self._held_references)

    def losses_of(self, run: Callable[..., Any], calls: Sequence[list[Any]], references: Sequence[Any]) -> Array:
        """The loss of each sample, one call after another; infinite where the rewritten model fails."""
        found = []
        for leaves, reference in zip(calls, references, strict=True):
            try:
                with torch.no_grad():
                    output = self._entry.program.user_outputs(run(*leaves))
            except Exception:  # a rewrite that fails on some data is no candidate
                _LOG.debug("a rewritten model failed on calibration data", exc_info=True)
                return np.array([math.inf])
            found.append(losses(self._budget.metric, output, reference, self._budget.output).numpy())
        return np.concatenate(found)

    def work(self, composition: Composition) -> float:
        """Floating-point operations over those of the exact model."""
        found = []
        for candidates in (composition, ()):
            program = self._rewritten(candidates)
            if program is None:
                return math.nan
            self._finish.run(program, Session(verify="off"))
            found.append(sum(node_cost(node).flops for node in program.graph.nodes if node.op == "call_function"))
        return found[0] / found[1]

    def ratio(self, composition: Composition, thorough: bool = False) -> float:
        """The lowered model's time over the exact one's."""
        executable = self.executable(composition)
        if executable is None:
            return math.nan
        try:
            return median(self.ratios_of(executable, thorough))
        except Exception:  # as above
            _LOG.debug("a rewritten model failed on the example inputs", exc_info=True)
            return math.nan

    def ratios_of(self, executable: Executable, thorough: bool = True) -> list[float]:
        """The same of a finished model, by every pair of turns."""
        exact = self._entry.executable
        seconds, fewest, most = _THOROUGH if thorough else _QUICK
        if not thorough:
            seconds = min(seconds, _PART * self._budget.seconds)
        return _ratios(lambda: exact(*self.example), lambda: executable(*self.example), seconds, fewest, most)

    def _rewritten(self, composition: Composition) -> Program | None:
        """The recognised program with all rewrites; None where one of them cannot be made."""
        program, session = self._recognised.copy(), Session(verify="off")
        try:
            with no_cycle_search():
                made = [rewrite.run(program, session) for rewrite in rewrites(composition)]
        except Exception:  # a pass that fails on a composition is no candidate there
            return None
        return program if all(made) else None

    def executable(self, composition: Composition) -> Executable | None:
        """The lowered model; None where the rewrites cannot be made."""
        if self._lowered is not None and self._lowered[0] == composition:
            return self._lowered[1]
        self._lowered = None  # two lowered models at a time: this one, and the exact one
        give_back()
        program = self._rewritten(composition)
        if program is None:
            return None
        with no_cycle_search():
            self._finish.run(program, Session(verify="off"))
            executable = lower(program, self._tuner)
        self._tuner.remember(executable.tuning)
        self._lowered = composition, executable
        return executable


def _reference(model: nn.Module, call: Call) -> Any:
    try:
        return output_of(model, *call)
    except Exception as error:  # a model may raise anything
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise BudgetError(f"the model itself fails on a calibration batch ({type(error).__name__}: {said})") from error


def _seconds(call: Callable[[], Any]) -> float:
    """The median time of a few calls."""
    call()
    return median(_turn(call, _repeats(call)) for _ in range(5))


def _repeats(call: Callable[[], Any]) -> int:
    return max(1, round(_TURN / max(_turn(call, 1), 1e-6)))


def _turn(call: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def _ratios(first: Callable[[], Any], second: Callable[[], Any], seconds: float, fewest: int, most: int) -> list[float]:
    """The second's time over the first's in each pair of turns; who begins changes from pair to pair."""
    second()
    repeats = _repeats(first)
    once = _turn(first, repeats) * repeats
    turns = int(np.clip(seconds / max(2 * once, 1e-6), fewest, most))
    ratios = []
    for number in range(turns):
        if number % 2:
            after = _turn(second, repeats)
            before = _turn(first, repeats)
        else:
            before = _turn(first, repeats)
            after = _turn(second, repeats)
        ratios.append(after / before)
    return ratios
