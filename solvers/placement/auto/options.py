"""What the solver is told besides the problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from regraft.solvers.placement.auto.layer import Effort


@dataclass(frozen=True)
class Options:
    """How ``solve`` works. ``time_limit`` in seconds, None for no limit; the same seed gives the same plan, unless the
    time limit stopped it. ``keep_balance``: be no less balanced than EPLB where that costs nothing of the objective.
    """

    time_limit: float | None = 60.0
    seed: int = 0
    keep_balance: bool = True
    effort: Effort = field(default_factory=Effort)
    #: Called with the part done, 0 to 1.
    progress: Callable[[float], None] | None = None
