"""What every way of improving a plan is given: the problem, the plans to start from, time, and where work may run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np

from regraft.solvers.placement.auto.denoise import denoised
from regraft.solvers.placement.auto.descent import Clock
from regraft.solvers.placement.auto.items import Array
from regraft.solvers.placement.auto.options import Options
from regraft.solvers.placement.constraints import Constraints
from regraft.solvers.placement.metrics import balancedness
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.slots import SlotCounts

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Search:
    """One call of ``solve`` after its starts are made; no result may be worse than any of ``starts``, nor, where a
    valid plan is found that is not, than any of ``baselines``.
    """

    objective: Objective
    slots: SlotCounts
    constraints: Constraints
    options: Options
    clock: Clock
    executor: Executor | None
    #: Valid plans by name, the cheapest of them, and the one whose balance is to be kept up with (None: none).
    starts: dict[str, Plan]
    best: Plan
    keep: Plan | None
    #: Plans of the baselines as their authors make them: with two copies of an expert on a rank, perhaps.
    baselines: dict[str, Plan] = field(default_factory=dict)

    @cached_property
    def smooth(self) -> Objective:
        """The objective on batches without their sampling noise: what the search looks at."""
        return self.objective.on(denoised(self.objective.workload))

    @cached_property
    def workers(self) -> int:
        """How many tasks run at a time."""
        return max(1, int(getattr(self.executor, "_max_workers", 1)))

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Results in order, in this process or through the executor."""
        return map(function, tasks) if self.executor is None else self.executor.map(function, tasks)

    def share(self, left: int) -> float | None:
        """Seconds for one of ``left`` tasks, None without a limit."""
        return None if self.clock.deadline is None else self.clock.left * min(self.workers, left) / max(left, 1)

    @cached_property
    def limit(self) -> float:
        """The least objective of all starts and baselines: being balanced may not cost more than that."""
        return min(self.objective.value(plan) for plan in (*self.starts.values(), *self.baselines.values()))

    def pins(self, at: int) -> dict[int, int]:
        """Expert to rank, of the layer at a position."""
        return self.constraints.pins(self.objective.model.layer_ids[at])

    def seconds(self, at: int, table: Slots) -> Array:
        """Mean seconds of a layer that depends on no other, ``[scenarios]``."""
        numbers = range(len(self.objective.workload.scenarios))
        return np.array([np.sum(self.objective.layer(number, at, table), axis=0).mean() for number in numbers])

    def uneven(self, at: int, table: Slots) -> Array:
        """Largest over mean rank load, less one, mean over batches, ``[scenarios]``."""
        numbers = range(len(self.objective.workload.scenarios))
        loads = [self.objective.loads(number, at, table).tokens for number in numbers]
        return np.array([float((1.0 / balancedness(load)).mean()) - 1.0 for load in loads])

    def balance(self, at: int, table: Slots) -> float:
        """Balancedness of a layer without sampling noise, weighted mean over scenarios."""
        numbers = range(len(self.objective.workload.scenarios))
        own = [balancedness(self.smooth.loads(number, at, table).tokens).mean() for number in numbers]
        return float(self.objective.weights @ own)

    def report(self, part: float) -> None:
        """Tell who waits which part is done."""
        if self.options.progress is not None:
            self.options.progress(part)
