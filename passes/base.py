"""What a pass is: a frozen dataclass whose fields are its options; valid program in, valid program out."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from regraft.ir.driver import Driver, Session
from regraft.ir.program import Program
from regraft.ir.rule import Rule


@dataclass(frozen=True)
class Pass:
    """Base of all passes. ``run`` changes the program in place and returns how many rewrites it made."""

    @property
    def name(self) -> str:
        """The class name in kebab case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(self).__name__).lower()

    def run(self, program: Program, session: Session) -> int:
        """Rewrite ``program``; what fired and what was refused goes to ``session.log``."""
        raise TypeError(f"pass {self.name} does nothing")


@dataclass(frozen=True)
class RulePass(Pass):
    """A pass that applies a fixed set of rules until none fires."""

    rules: ClassVar[Sequence[Rule]] = ()

    def run(self, program: Program, session: Session) -> int:
        return Driver(program, self.rules, session, self.name).run()


@dataclass(frozen=True)
class Pipeline:
    """Passes in order."""

    passes: tuple[Pass, ...]

    def run(self, program: Program, session: Session) -> dict[str, float]:
        """Run every pass; returns the seconds each took."""
        seconds: dict[str, float] = {}
        for item in self.passes:
            started = time.perf_counter()
            item.run(program, session)
            seconds[item.name] = seconds.get(item.name, 0.0) + time.perf_counter() - started
        return seconds
