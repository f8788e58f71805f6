"""Modelled time of a layer: the slowest rank's compute and the busiest port's traffic, one after the other.

Compute of a rank is the longer of reading the weights of its activated experts and of its tokens' operations, plus a
fixed launch. Traffic follows the communication model that the engine uses:

- ``dispatch``: a token goes from its source rank once to each distinct destination node and rank, and comes back;
- ``per-expert``: one message there and back for each token and expert;
- ``resident``: a token stays where its expert was, and moves between layers (MoETuner, arXiv 2502.06643; ExFlow,
  arXiv 2401.08383); the first layer costs no traffic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.plan import Plan, Slots
from regraft.solvers.placement.ports import Ports
from regraft.solvers.placement.split import SPLITS, chosen_ranks, slot_shares
from regraft.solvers.placement.traffic import touched
from regraft.solvers.placement.workload import Scenario, Workload

COMMUNICATION = ("dispatch", "per-expert", "resident")
AGGREGATES = ("weighted", "min-max")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Loads:
    """What the ranks of one layer do: ``tokens`` and activated ``experts``, both ``[batches, ranks]``."""

    tokens: Array
    experts: Array


class Objective:
    """What a plan costs on a workload, in seconds per batch over all expert layers.

    ``aggregate`` joins scenarios: "weighted" is the weighted mean of their seconds; "min-max" the largest slowdown, a
    scenario's seconds over those it would need with no traffic and perfect balance, so that large batches do not
    hide small ones. ``communication`` is one model, or one for each phase. Raises ``PlacementError``.
    """

    def __init__(
        self,
        model: MoeModel,
        cluster: Cluster,
        workload: Workload,
        communication: str | Mapping[str, str] = "dispatch",
        split: str = "even",
        aggregate: str = "weighted",
    ) -> None:
        _check(model, workload, split, aggregate)
        self.model, self.cluster, self.workload = model, cluster, workload
        self.split, self.aggregate = split, aggregate
        self.communication = tuple(_communication(communication, scenario) for scenario in workload.scenarios)
        self.ports = Ports.of(cluster)
        self.rates = cluster.flops * cluster.speed / model.expert_flops
        self.reads = cluster.memory_bandwidth * cluster.speed / model.expert_bytes
        self.latency = 2.0 * cluster.worst_latency if cluster.num_ranks > 1 else 0.0
        self.weights = np.array([scenario.weight for scenario in workload.scenarios])
        self.weights /= self.weights.sum()
        self.ideal = np.array([self._ideal(scenario) for scenario in workload.scenarios])

    @property
    def chained(self) -> bool:
        """Whether a layer's time depends on where the layer before it lies."""
        return "resident" in self.communication

    def with_workload(self, workload: Workload) -> Objective:
        """The same objective on another workload of the model: held-out batches, or a smaller part to search on."""
        by_phase = dict(zip((s.phase for s in self.workload.scenarios), self.communication, strict=True))
        communication = by_phase if len(set(self.communication)) > 1 else self.communication[0]
        return Objective(self.model, self.cluster, workload, communication, self.split, self.aggregate)

    def on(self, workload: Workload) -> Objective:
        """The same objective on other counts of the same scenarios and layers; slowdowns refer to what they did."""
        same = Objective.__new__(Objective)
        same.__dict__.update(self.__dict__)
        same.workload = workload
        return same

    def loads(self, number: int, at: int, table: Slots) -> Loads:
        """What the ranks do in layer ``at`` (by position) in each batch of a scenario."""
        shares = slot_shares(table, self.cluster, self.split, self.model.num_experts)
        counts = self.workload.scenarios[number].counts[:, at]
        per_slot = counts[:, np.maximum(table, 0)] * shares
        return Loads(per_slot.sum(2), np.minimum(per_slot, 1.0).sum(2))

    def compute(self, loads: Loads) -> Array:
        """Seconds of the slowest rank, ``[batches]``."""
        busy = np.maximum(loads.tokens / self.rates, loads.experts / self.reads)
        slowest: Array = busy.max(1) + self.cluster.launch
        return slowest

    def layer(self, number: int, at: int, table: Slots, previous: Slots | None = None) -> tuple[Array, Array]:
        """Seconds of compute and of traffic in each batch, ``[batches]`` each; ``previous`` is the table before."""
        loads = self.loads(number, at, table)
        return self.compute(loads), self._traffic(number, at, table, previous, loads)

    def seconds(self, plan: Plan) -> list[Array]:
        """Modelled seconds of every scenario's batches and layers, ``[batches, layers]`` each."""
        self.check_plan(plan)
        return [
            np.stack(
                [
                    np.sum(self.layer(number, at, table, plan.slots[at - 1] if at else None), axis=0)
                    for at, table in enumerate(plan.slots)
                ],
                axis=1,
            )
            for number in range(len(self.workload.scenarios))
        ]

    def layer_means(self, plan: Plan) -> Array:
        """Mean seconds over batches, ``[scenarios, layers]``."""
        return np.stack([seconds.mean(0) for seconds in self.seconds(plan)])

    def joined(self, seconds: Array) -> Array:
        """One number from seconds per scenario, ``[scenarios, ...]``: what is minimised."""
        shape = (-1,) + (1,) * (seconds.ndim - 1)
        if self.aggregate == "min-max":
            slowdown: Array = (seconds / self.ideal.reshape(shape)).max(0)
            return slowdown
        mean: Array = (seconds * self.weights.reshape(shape)).sum(0)
        return mean

    def value(self, plan: Plan) -> float:
        """The objective: seconds a batch, or under "min-max" the largest slowdown."""
        return float(self.joined(self.layer_means(plan).sum(1)))

    def node_reach(self, number: int, at: int, table: Slots) -> tuple[Array, Array]:
        """Parts of the tokens that reach each node and each rank in a layer, ``[nodes]`` and ``[ranks]``."""
        scenario = self.workload.scenarios[number]
        if scenario.experts is None:
            return self._independent_reach(scenario, at, table)
        served = self._served(scenario, at, table)
        ranks = touched(served, self.cluster.num_ranks)
        nodes = touched(np.where(served >= 0, self.cluster.node_of_rank[served], -1), self.cluster.num_nodes)
        return nodes.mean(0), ranks.mean(0)

    def check_plan(self, plan: Plan) -> None:
        """Raise ``PlacementError`` where a plan is of another model or cluster."""
        mine = (self.model.num_experts, self.model.num_layers, self.cluster.num_ranks)
        theirs = (plan.num_experts, plan.num_layers, plan.num_ranks)
        if mine != theirs:
            raise PlacementError(
                f"a plan of {theirs} (experts, layers, ranks) was given; expected {mine}; is it of another model?"
            )

    def _traffic(self, number: int, at: int, table: Slots, previous: Slots | None, loads: Loads) -> Array:
        kind = self.communication[number]
        scenario = self.workload.scenarios[number]
        tokens = scenario.tokens[:, at]
        if kind == "per-expert":
            per_byte = self.ports.busiest(loads.tokens @ self.cluster.membership, loads.tokens)
            return self.latency + per_byte * (self.model.dispatch_bytes + self.model.combine_bytes)
        if kind == "resident":
            if previous is None:
                return np.zeros(len(tokens))
            hops = self.hops(number, at, previous, table)
            busiest = self.ports.busiest_of(*self._between(hops))
            return self.latency / 2 + tokens * busiest * self.model.combine_bytes
        busiest = self._dispatch_busiest(number, at, table)
        return self.latency + tokens * busiest * (self.model.dispatch_bytes + self.model.combine_bytes)

    def hops(self, number: int, at: int, previous: Slots, table: Slots) -> Array:
        """Copies per token that go from rank to rank between layer ``at - 1`` and ``at``, ``[ranks, ranks]``."""
        moves = self.workload.scenarios[number].transitions
        if moves is None:
            raise PlacementError(
                f"scenario {self.workload.scenarios[number].name!r} has no transitions between layers; "
                "the resident model needs them; record choices per token"
            )
        before, after = self.rank_shares(previous), self.rank_shares(table)
        hops: Array = before.T @ moves[at - 1] @ after
        return hops

    def rank_shares(self, table: Slots) -> Array:
        """Part of each expert's tokens that each rank takes, ``[experts, ranks]``."""
        shares = slot_shares(table, self.cluster, self.split, self.model.num_experts)
        found = np.zeros((self.model.num_experts, self.cluster.num_ranks))
        rank, slot = np.nonzero(table >= 0)
        np.add.at(found, (table[rank, slot], rank), shares[rank, slot])
        return found

    def _between(self, hops: Array) -> tuple[Array, Array]:
        member = self.cluster.membership
        off = hops * ~np.eye(len(hops), dtype=bool)
        return member.T @ hops @ member, (off * self.cluster.same_node).sum(0)

    def _dispatch_busiest(self, number: int, at: int, table: Slots) -> float:
        scenario = self.workload.scenarios[number]
        explicit = scenario.experts is not None and (self.split == "nearest" or scenario.sources is not None)
        if not explicit:
            return float(self.ports.busiest(*self.node_reach(number, at, table)))
        nodes, ranks = self.exact_copies(number, at, table)
        return self.ports.busiest_of(nodes, ranks)

    def exact_copies(self, number: int, at: int, table: Slots) -> tuple[Array, Array]:
        """Copies per token between nodes ``[nodes, nodes]`` and into ranks ``[ranks]``, by each token's source."""
        scenario = self.workload.scenarios[number]
        served = self._served(scenario, at, table)
        source = self._sources(scenario)
        ranks = touched(served, self.cluster.num_ranks)
        ranks[np.arange(len(source)), source] = False
        node = self.cluster.node_of_rank[source]
        nodes = touched(np.where(served >= 0, self.cluster.node_of_rank[served], -1), self.cluster.num_nodes)
        between = np.stack([nodes[node == here].sum(0) for here in range(self.cluster.num_nodes)]).astype(np.float64)
        np.fill_diagonal(between, 0.0)
        return between / len(source), ranks.mean(0)

    def _served(self, scenario: Scenario, at: int, table: Slots) -> NDArray[np.int64]:
        assert scenario.experts is not None
        chosen, tokens = scenario.experts[:, at], np.arange(len(scenario.experts))
        experts = self.model.num_experts
        return chosen_ranks(table, chosen, tokens, self._sources(scenario), self.cluster, self.split, experts)

    def _sources(self, scenario: Scenario) -> NDArray[np.int64]:
        assert scenario.experts is not None
        if scenario.sources is None:
            return np.arange(len(scenario.experts)) % self.cluster.num_ranks
        return scenario.sources.astype(np.int64) % self.cluster.num_ranks

    def _independent_reach(self, scenario: Scenario, at: int, table: Slots) -> tuple[Array, Array]:
        """Counts only: experts are taken to be chosen independently of each other."""
        chance = scenario.counts[:, at].sum(0) / max(scenario.tokens[:, at].sum(), 1e-9)
        share = slot_shares(table, self.cluster, self.split, self.model.num_experts)
        missed = np.log1p(-np.minimum(chance[np.maximum(table, 0)] * share, 1.0 - 1e-9)).sum(1)
        return 1.0 - np.exp(missed @ self.cluster.membership), 1.0 - np.exp(missed)

    def _ideal(self, scenario: Scenario) -> float:
        tokens = scenario.counts.sum(2) / self.rates.sum()
        read = np.minimum(scenario.counts, 1.0).sum(2) / self.reads.sum()
        return float((np.maximum(tokens, read) + self.cluster.launch).mean(0).sum())


def _check(model: MoeModel, workload: Workload, split: str, aggregate: str) -> None:
    if workload.num_experts != model.num_experts or workload.layer_ids != model.layer_ids:
        raise PlacementError(
            f"a trace of {workload.num_experts} experts and {workload.num_layers} layers was given for a model of "
            f"{model.num_experts} and {model.num_layers}; a layer is missing or the trace is of another model"
        )
    if workload.top_k != model.top_k:
        raise PlacementError(f"a trace of top-{workload.top_k} was given for a model of top-{model.top_k}")
    for what, value, known in (("split", split, SPLITS), ("aggregate", aggregate, AGGREGATES)):
        if value not in known:
            raise PlacementError(f"{what} {value!r} was given; expected one of {', '.join(known)}")


def _communication(given: str | Mapping[str, str], scenario: Scenario) -> str:
    kind = given if isinstance(given, str) else given.get(scenario.phase, "dispatch")
    if kind not in COMMUNICATION:
        raise PlacementError(f"communication {kind!r} was given; expected one of {', '.join(COMMUNICATION)}")
    if kind == "resident" and scenario.transitions is None:
        raise PlacementError(
            f"scenario {scenario.name!r} has no transitions between layers; the resident model needs them; "
            "record choices per token"
        )
    return kind
