"""Running a pipeline with limited fuel, and measuring how far the rewritten model is from the captured one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from regraft.bisect import Turn, first_bad
from regraft.build import Passes
from regraft.ir.driver import Fuel, Session
from regraft.ir.program import Program
from regraft.ir.records import Application, Refusal
from regraft.ir.verify import relative_l2
from regraft.tolerance import tolerance


@dataclass(frozen=True)
class Trial:
    """One run of the pipeline: the end-to-end error, and why it is infinite when a pass or the model raised."""

    error: float
    session: Session
    failure: str = ""


@dataclass(frozen=True)
class Bisection:
    """What a search found. ``application`` is the rewrite at ``turn``; ``failure`` says what was raised
    there, if anything; ``rolled_back`` are rewrites that the driver itself took back."""

    applications: int
    error: float
    tolerance: float
    turn: Turn | None
    application: Application | None
    failure: str
    rolled_back: tuple[Refusal, ...]


class Bench:
    """Tries a pipeline on copies of one captured program, on its example inputs."""

    def __init__(self, program: Program, pipeline: Passes) -> None:
        self.program = program
        self.pipeline = pipeline
        self.reference = self._outputs(program.copy())

    def tolerance(self) -> float:
        """The error that the element types allow which the model computes in."""
        return tolerance(self.program, self.reference)

    def run(self, applications: int | None = None) -> Trial:
        """Rewrite with at most this many applications, unverified, so that a wrong one stays and shows."""
        session = Session(fuel=Fuel(applications), verify="off")
        twin = self.program.copy()
        try:
            self.pipeline.run(twin, session)
            outputs = self._outputs(twin)
        except Exception as error:  # a rule may raise anything; that it raises is what is searched for
            return Trial(math.inf, session, f"{type(error).__name__}: {error}")
        return Trial(self._error(outputs), session)

    def bisect(self, tolerance: float | None = None, advance: Callable[[], None] = lambda: None) -> Bisection:
        """Find the first application after which the error exceeds ``tolerance`` (default: by element type).

        ``advance`` is called after each trial.
        """
        limit = self.tolerance() if tolerance is None else tolerance
        full = self.run()
        total = full.session.applied
        trials = {total: full}

        def error_of(number: int) -> float:
            if number not in trials:
                trials[number] = self.run(number)
                advance()
            return trials[number].error

        turn = first_bad(error_of, total, limit)
        made = trials[turn.number].session.log.applications if turn else []
        return Bisection(
            applications=total,
            error=full.error,
            tolerance=limit,
            turn=turn,
            application=made[turn.number - 1] if turn and turn.number else None,
            failure=trials[turn.number].failure if turn else "",
            rolled_back=tuple(r for r in full.session.log.refusals if r.kind == "rolled back"),
        )

    def _outputs(self, program: Program) -> list[torch.Tensor]:
        inputs = [v.clone() if isinstance(v, torch.Tensor) else v for v in program.example]
        flat = program.user_outputs(program.callable()(*inputs))
        return [value for value in tree_leaves(flat) if isinstance(value, torch.Tensor)]

    def _error(self, outputs: list[Any]) -> float:
        pairs = zip(outputs, self.reference, strict=True)
        return max((relative_l2(value, wanted) for value, wanted in pairs), default=0.0)
