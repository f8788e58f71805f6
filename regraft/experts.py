"""What ``compile(experts=…)`` does with a placement plan: sharded where a process group runs the model, permuted
where one process does."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import OptionError
from regraft.ir.ops.moe_dispatch import sharded_sites
from regraft.ir.program import Program
from regraft.ir.records import Log
from regraft.passes.base import Pipeline
from regraft.passes.experts.errors import PermutationError, ShardingError
from regraft.passes.experts.permute import PermuteExperts
from regraft.passes.experts.shard import ShardExperts
from regraft.passes.experts.sharding import Sharding
from regraft.passes.pipeline import default_pipeline
from regraft.peers import Agreement
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.plan import Plan


@dataclass(frozen=True)
class Placement:
    """A plan and the pass that carries it out; ``together``: a process group is there, every rank of which compiles."""

    sharding: Sharding
    rewrite: PermuteExperts | ShardExperts
    together: bool = False

    @property
    def sharded(self) -> bool:
        """Whether the program becomes that of one rank, which the original cannot stand in for."""
        return isinstance(self.rewrite, ShardExperts)

    def pipeline(self, target: str) -> Pipeline:
        """The default passes, with this placement among them."""
        return default_pipeline(target, self.rewrite)

    def meeting(self, verify: str) -> Together:
        """The ranks compile now, all at once, with ``verify`` as in ``regraft.compile``."""
        return Together(self.sharding, verify)

    def refused(self, log: Log) -> list[str]:
        """Why experts stayed where they were."""
        found = [refusal for refusal in log.refusals if refusal.pass_name == self.rewrite.name]
        return [f"experts of {refusal.node} stay: {refusal.reason} {refusal.user_line}".rstrip() for refusal in found]


class Together(Agreement):
    """What all ranks of a sharded model agree on while they compile it."""

    def __init__(self, sharding: Sharding, verify: str) -> None:
        super().__init__()
        self._sharding, self._verify = sharding, verify

    def agree(self, program: Program) -> None:
        """See that all ranks have made programs that belong together. Raises ``PeerError``."""
        given, plan = self._sharding, self._sharding.plan.to_json().encode()
        self.same("plans", hashlib.sha256(plan).hexdigest()[:12])
        self.same("options", f"split={given.split}, communication={given.communication}, verify={self._verify}")
        self.same("expert layers", [site["layer"] for site in sharded_sites(program.graph)])

    def worst(self, drift: float) -> float:
        """The largest drift of all ranks, NaN the worst. Raises ``PeerError``."""
        drifts: list[float] = self.facts(drift)
        return next((value for value in drifts if value != value), max(drifts))


def placement_of(experts: Any) -> Placement:
    """What is to be done with ``experts``: a plan, the path of a plan file, or a ``Sharding``. Raises ``OptionError``
    where it does not fit the process group, or needs one that is not there."""
    sharding = _sharding(experts)
    ranks, here = sharding.plan.num_ranks, _here()
    if here is not None:
        rank, world = here
        if world != ranks:
            raise OptionError(
                f"experts: the plan is for {ranks} ranks, and the process group has {world}; run under torchrun "
                f"--nproc-per-node {ranks}, or plan for {world}"
            )
        if sharding.rank is not None and sharding.rank != rank:
            raise OptionError(f"experts: rank {sharding.rank} was given, and this process is rank {rank}; leave it out")
        return Placement(sharding, ShardExperts(sharding, rank), together=True)
    if sharding.rank is not None:
        return Placement(sharding, ShardExperts(sharding, sharding.rank))
    try:
        return Placement(sharding, PermuteExperts.of_plan(sharding.plan))
    except PermutationError as error:
        raise OptionError(
            f"experts: without a process group they can only be permuted, and {error}; to shard them, run under "
            f"torchrun --nproc-per-node {ranks} and call torch.distributed.init_process_group first, or compile one "
            "rank's part with Sharding(plan, rank=…)"
        ) from error


def _sharding(experts: Any) -> Sharding:
    if isinstance(experts, Sharding):
        return experts
    try:
        if isinstance(experts, Plan):
            return Sharding(experts)
        if isinstance(experts, (str, os.PathLike)):
            return Sharding(Plan.load(Path(experts)))
    except (PlacementError, ShardingError) as error:
        raise OptionError(f"experts: {error}; give a plan that `regraft place` wrote") from error
    raise OptionError(
        f"experts is a {type(experts).__name__}; give a Plan, the path of a plan file, or a Sharding of a plan"
    )


def _here() -> tuple[int, int] | None:
    """Rank and size of the default process group, where there is one."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.get_rank(), dist.get_world_size()
