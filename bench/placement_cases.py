"""The cases of ``bench.placement``: real counts of OLMoE and Mixtral, planted structure, and large sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from regraft.solvers.placement.cluster import Cluster, preset
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.objective import Objective
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.readers.counts_json import read_counts_json
from regraft.solvers.placement.synthetic import planted_trace, power_law_trace
from regraft.solvers.placement.trace import Trace
from regraft.solvers.placement.workload import workload_of

OLMOE, MIXTRAL = "olmoe_routing/olmoe-1b-7b-0924.json", "olmoe_routing/mixtral-8x7b-v0.1.json"
#: Hidden size and width of an expert.
OLMOE_SIZES, MIXTRAL_SIZES, QWEN_SIZES, DEEPSEEK_SIZES = (2048, 1024), (4096, 14336), (4096, 1536), (7168, 2048)


class MissingData(Exception):
    """A case's recorded counts are not there."""


@dataclass(frozen=True)
class Case:
    """One problem: what is planned on and what is scored on, and which targets it is there for."""

    name: str
    objective: Objective
    held_out: Objective | None = None
    redundant: int = 0
    #: The best placement, where the structure was planted.
    optimum: Plan | None = None
    fewer_copies: bool = False
    worst_balance: float | None = None
    #: A first plan soon, and a final one in time and memory.
    in_time: bool = False


def olmoe_cross(data: Path) -> Case:
    """Planned on three domains, scored on the other three."""
    trace = _counts(data, OLMOE)
    return _cross("olmoe-cross", trace, ("arxiv", "book", "c4"), preset("h100x8"), OLMOE_SIZES)


def olmoe_min_max(data: Path) -> Case:
    """The worst of six domains, scored on the domains it was planned for; a message for each expert."""
    trace = _counts(data, OLMOE)
    objective = _objective(trace, preset("h100x8"), OLMOE_SIZES, "per-expert", "min-max")
    return Case("olmoe-min-max", objective, worst_balance=0.87)


def olmoe_min_max_dispatch(data: Path) -> Case:
    """The same with a message for each rank; experts are taken to be chosen independently, as counts say no more."""
    trace = _counts(data, OLMOE)
    objective = _objective(trace, preset("h100x8"), OLMOE_SIZES, "dispatch", "min-max")
    return Case("olmoe-min-max-dispatch", objective, worst_balance=0.87)


def mixtral_cross(data: Path) -> Case:
    """Planned on three domains, scored on the other two; four GPUs, two experts each."""
    trace = _counts(data, MIXTRAL)
    return _cross("mixtral-cross", trace, ("arxiv", "book", "c4"), Cluster.uniform(2, 2), MIXTRAL_SIZES)


def mixtral_min_max(data: Path) -> Case:
    """The worst of five domains."""
    trace = _counts(data, MIXTRAL)
    return Case("mixtral-min-max", _objective(trace, Cluster.uniform(2, 2), MIXTRAL_SIZES, aggregate="min-max"))


def mixtral_resident(data: Path) -> Case:
    """MoETuner's own model and communication: tokens stay where their experts are."""
    trace = _counts(data, MIXTRAL)
    return Case("mixtral-resident", _objective(trace, Cluster.uniform(2, 2), MIXTRAL_SIZES, "resident"))


def planted_coactivation(data: Path) -> Case:
    """Experts chosen together in hidden groups, one a node."""
    hidden = planted_trace(6, 64, 6, groups=4, parts=4, batches=8, tokens=2048, affinity=0.5, seed=1)
    return _planted("planted-coactivation", hidden.trace, hidden.plan(16), Cluster.uniform(4, 4), "dispatch")


def planted_affinity(data: Path) -> Case:
    """Tokens that follow hidden chains of groups from layer to layer, and stay where their experts are."""
    hidden = planted_trace(6, 32, 4, groups=4, parts=1, batches=8, tokens=2048, affinity=0.95, seed=1)
    return _planted("planted-affinity", hidden.trace, hidden.plan(4), Cluster.uniform(2, 2), "resident")


def size_32x8(data: Path) -> Case:
    """Mixtral's size on one node of four, with weak affinity between layers."""
    trace = planted_trace(32, 8, 2, groups=2, parts=1, batches=8, tokens=1024, focus=0.3, affinity=0.3, seed=2).trace
    return _held_out("32x8-on-4", trace, Cluster.uniform(1, 4), MIXTRAL_SIZES, 0)


def size_94x128(data: Path) -> Case:
    """Qwen3-235B's size on two nodes."""
    trace = power_law_trace(94, 128, 8, seed=3)
    return _held_out("94x128-on-16", trace, preset("h100x16"), QWEN_SIZES, 0)


def size_58x256(data: Path) -> Case:
    """DeepSeek-V3's size on four nodes with 32 redundant slots."""
    trace = power_law_trace(58, 256, 8, seed=4)
    case = _held_out("58x256-on-32", trace, preset("h100x32"), DEEPSEEK_SIZES, 32)
    return Case(case.name, case.objective, case.held_out, case.redundant, in_time=True)


def size_60x384(data: Path) -> Case:
    """Kimi-K2's size on eight nodes."""
    return _held_out("60x384-on-64", power_law_trace(60, 384, 8, seed=5), preset("h100x64"), DEEPSEEK_SIZES, 0)


def size_58x256_on_320(data: Path) -> Case:
    """One slot a rank: copies of the hottest experts on the ranks left over."""
    trace = power_law_trace(58, 256, 8, batches=16, seed=6)
    return _held_out("58x256-on-320", trace, Cluster.uniform(40, 8), DEEPSEEK_SIZES, 64)


CASES: dict[str, Callable[[Path], Case]] = {
    "olmoe-cross": olmoe_cross,
    "olmoe-min-max": olmoe_min_max,
    "olmoe-min-max-dispatch": olmoe_min_max_dispatch,
    "mixtral-cross": mixtral_cross,
    "mixtral-min-max": mixtral_min_max,
    "mixtral-resident": mixtral_resident,
    "planted-coactivation": planted_coactivation,
    "planted-affinity": planted_affinity,
    "32x8-on-4": size_32x8,
    "94x128-on-16": size_94x128,
    "58x256-on-32": size_58x256,
    "60x384-on-64": size_60x384,
    "58x256-on-320": size_58x256_on_320,
}


def _counts(data: Path, name: str) -> Trace:
    if not (data / name).exists():
        raise MissingData(f"{name} is not in the data folder; name the folder with --data or REGRAFT_MOE_DATA")
    return read_counts_json(data / name)


def _objective(
    trace: Trace,
    cluster: Cluster,
    sizes: tuple[int, int],
    communication: str = "dispatch",
    aggregate: str = "weighted",
) -> Objective:
    """Weights and tokens in two bytes."""
    parameters = 3 * sizes[0] * sizes[1]
    model = MoeModel(
        trace.num_experts,
        trace.top_k,
        trace.layer_ids,
        trace.num_hidden_layers,
        expert_bytes=2.0 * parameters,
        dispatch_bytes=2.0 * sizes[0],
        combine_bytes=2.0 * sizes[0],
        expert_flops=2.0 * parameters,
        name=trace.model_name,
    )
    return Objective(model, cluster, workload_of(trace), communication, aggregate=aggregate)


def _cross(name: str, trace: Trace, domains: tuple[str, ...], cluster: Cluster, sizes: tuple[int, int]) -> Case:
    others = [domain for domain in trace.scenarios if domain not in domains]
    objective = _objective(trace.select(domains), cluster, sizes)
    return Case(name, objective, objective.with_workload(workload_of(trace.select(others))))


def _held_out(name: str, trace: Trace, cluster: Cluster, sizes: tuple[int, int], redundant: int) -> Case:
    first, second = trace.split(0.5)
    objective = _objective(first, cluster, sizes)
    return Case(name, objective, objective.with_workload(workload_of(second)), redundant)


def _planted(name: str, trace: Trace, optimum: Plan, cluster: Cluster, communication: str) -> Case:
    first, second = trace.split(0.5)
    objective = _objective(first, cluster, DEEPSEEK_SIZES, communication)
    held_out = objective.with_workload(workload_of(second))
    return Case(name, objective, held_out, optimum=optimum, fewer_copies=True)
