"""How a placement plan is run by ranks that each hold a part of the experts: the routing table of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regraft.passes.experts.errors import ShardingError
from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.split import SPLITS, Copies, Ints, nearest_slots

COMMUNICATIONS = ("dispatch", "per-expert")


@dataclass(frozen=True)
class Sharding:
    """A plan and how tokens use it; the words are those that plans predict traffic with.

    ``split`` says which copy of a replicated expert a token takes: "even" by a hash of the token's number (its place
    in its own rank's call) and the expert's, "nearest" by its rank. ``communication``: "dispatch" sends a token once to
    each rank that serves it, "per-expert" once for each choice. ``cluster`` tells which ranks share a node, for
    "nearest"; without one all do. ``rank`` is given to compile one rank's part without a process group.

    Raises ``ShardingError`` for a plan that has no slot for an expert, and for words that do not exist.
    """

    plan: Plan
    split: str = "even"
    communication: str = "dispatch"
    cluster: Cluster | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        for what, word, words in (
            ("split", self.split, SPLITS),
            ("communication", self.communication, COMMUNICATIONS),
        ):
            if word not in words:
                raise ShardingError(f"{what} {word!r} was given; expected one of {', '.join(words)}")
        ranks = self.plan.num_ranks
        if self.cluster is not None and self.cluster.num_ranks != ranks:
            raise ShardingError(
                f"a cluster of {self.cluster.num_ranks} ranks was given for a plan of {ranks}; give the plan's own"
            )
        if self.rank is not None and not 0 <= self.rank < ranks:
            raise ShardingError(f"rank {self.rank} was given for a plan of {ranks} ranks; give one of 0 to {ranks - 1}")
        for layer, held in zip(self.plan.layer_ids, self.plan.replicas, strict=True):
            if not held.all():
                raise ShardingError(
                    f"the plan has no slot for expert {held.argmin()} in layer {layer}; expected at least one for each "
                    f"of {self.plan.num_experts} experts"
                )

    def held(self, layer: int, rank: int) -> tuple[int, ...]:
        """The experts of a rank in the order of its slots, empty slots left out; ``layer`` by place in the plan."""
        return tuple(int(expert) for expert in self.plan.slots[layer][rank] if expert >= 0)

    def copies(self, layer: int, rank: int) -> Ints:
        """``[experts, most copies]`` physical slots, -1 padded, that tokens of ``rank`` choose from. Slots are counted
        with a rank's empty ones last, as it holds no weights for them."""
        copies = Copies.of(_empty_last(self.plan.slots[layer]), self.plan.num_experts)
        if self.split == "even":
            return copies.slots
        cluster = self.cluster or Cluster.uniform(1, self.plan.num_ranks)
        nearest: Ints = nearest_slots(copies, cluster)[rank][:, None]
        return nearest


def _empty_last(table: Slots) -> Slots:
    order = np.argsort(table < 0, axis=1, kind="stable")
    return np.take_along_axis(table, order, axis=1)
