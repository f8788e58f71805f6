"""Small models, clusters and traces that the tests share."""

from __future__ import annotations

from typing import Any

import numpy as np

from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.synthetic import Planted, planted_trace
from regraft.solvers.placement.trace import Batch, Trace
from regraft.solvers.placement.workload import workload_of

#: The example of the balancer's README: two layers of twelve experts, and what it prints for 16 slots on 8 GPUs.
EPLB_LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=np.float64,
)
EPLB_SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def random_experts(seed: int, layers: int, tokens: int, experts: int, top_k: int) -> np.ndarray[Any, Any]:
    """Distinct choices, ``[layers, tokens, top_k]``."""
    score = np.random.default_rng(seed).random((layers, tokens, experts))
    return np.argsort(score, axis=-1)[..., :top_k].astype(np.int32)


def random_trace(
    seed: int = 0, layers: int = 3, tokens: int = 40, experts: int = 8, top_k: int = 2, batches: int = 3
) -> Trace:
    """A trace of tokens."""
    made = [
        Batch.of_tokens(random_experts(seed * 100 + number, layers, tokens, experts, top_k), experts)
        for number in range(batches)
    ]
    return Trace(experts, top_k, tuple(range(layers)), tuple(made))


def planted(seed: int = 0, **facts: Any) -> Planted:
    """Two hidden groups of two parts in each of three layers, for two nodes of two ranks."""
    sizes: dict[str, Any] = dict(layers=3, experts=32, top_k=4, groups=2, parts=2, batches=8, tokens=1024)
    return planted_trace(**{**sizes, **facts}, seed=seed)


def objective_of(trace: Trace, cluster: Cluster, communication: str = "dispatch", **facts: Any) -> Objective:
    """An objective with a model that fits the trace."""
    groups = facts.pop("num_groups", 1)
    model = MoeModel(trace.num_experts, trace.top_k, trace.layer_ids, trace.num_hidden_layers, num_groups=groups)
    return Objective(model, cluster, workload_of(trace, facts.pop("by", "scenario")), communication, **facts)


TWO_BY_TWO = Cluster.uniform(2, 2)
