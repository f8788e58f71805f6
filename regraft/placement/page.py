"""The what-if page: what a plan would do before it is loaded, as one HTML file that needs no other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from regraft.placement.heat import load_map, traffic_map
from regraft.placement.show import migration_text
from regraft.report import units
from regraft.solvers.placement.compare import Comparison, Row
from regraft.solvers.placement.metrics import Metrics
from regraft.solvers.placement.objective import Objective

#: Heat maps are drawn for at most so many scenarios, the worst balanced first.
MOST_MAPS = 4


@dataclass(frozen=True)
class Tile:
    """One number of the header."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class LoadMaps:
    """One scenario: the plan's map, and that of the baseline beside it."""

    scenario: str
    balance: str
    own: Markup
    other_balance: str
    other: Markup


def render(comparison: Comparison, objective: Objective) -> str:
    """The page as text; ``objective`` is what was planned on. Names from the trace are escaped."""
    auto, beside = comparison.auto, comparison.row("eplb") or comparison.rows[-1]
    scored = auto.scored
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=objective.model.name or "placement",
            cluster=objective.cluster.name or f"{objective.cluster.num_ranks} ranks",
            style=Markup(files("regraft.report").joinpath("report.css.j2").read_text(encoding="utf-8")),
            verdict=_verdict(comparison, objective),
            tiles=_tiles(comparison, objective),
            rows=comparison.rows,
            min_max=objective.aggregate == "min-max",
            beside=beside.method,
            maps=_maps(auto, beside, objective),
            traffic=_traffic(auto, beside, objective),
            scenarios=scored.scenarios,
            where="held-out batches" if auto.held_out is not None else "the planned batches",
            memory=_memory(scored, objective),
            migration=None if auto.planned.migration is None else migration_text(auto.planned.migration),
            skipped=comparison.skipped,
            notes=comparison.solution.notes,
        )
    )


def _verdict(comparison: Comparison, objective: Objective) -> str:
    model, solution = objective.model, comparison.solution
    return (
        f"{model.num_layers} layers of {model.num_experts} experts (top-{model.top_k}) in "
        f"{max(comparison.auto.plan.slots_per_rank)} slots on each of {objective.cluster.num_ranks} ranks, "
        f"{objective.cluster.num_nodes} nodes; {' and '.join(dict.fromkeys(objective.communication))} communication, "
        f"{objective.split} split. The search stopped: {solution.stop}."
    )


def _tiles(comparison: Comparison, objective: Objective) -> list[Tile]:
    auto, scored = comparison.auto, comparison.auto.scored
    usual = comparison.row("eplb")
    tiles = [
        Tile("Gap to the bound", f"{auto.gap:.1%}", "no plan with these slots goes below"),
        Tile("Balance", f"{scored.balancedness:.3f}", _against(usual, "balancedness")),
        Tile("Copies between nodes", f"{scored.cross_node_copies:.3f}", _against(usual, "cross_node_copies")),
        Tile("Layer P99", units.seconds(scored.layer_p99), _against(usual, "layer_p99")),
    ]
    moved = auto.planned.migration
    if moved is not None:
        pays = "never pays back"
        if math.isfinite(moved.payback_batches):
            pays = f"pays back after {math.ceil(moved.payback_batches)} batches"
        tiles.append(Tile("Migration", units.count(moved.bytes, "B"), pays))
    return tiles


def _against(usual: Row | None, figure: str) -> str:
    if usual is None:
        return ""
    value = float(getattr(usual.scored, figure))
    return f"EPLB {units.seconds(value) if figure == 'layer_p99' else f'{value:.3f}'}"


def _maps(auto: Row, beside: Row, objective: Objective) -> list[LoadMaps]:
    """The worst balanced scenarios first."""
    scenarios = auto.scored.scenarios
    order = sorted(range(len(scenarios)), key=lambda number: scenarios[number].balancedness)[:MOST_MAPS]
    made = []
    for number in order:
        name = scenarios[number].name
        drawn = [
            load_map(
                row.scored.load[number],
                row.plan.layer_ids,
                objective.cluster.node_of_rank,
                f"load by layer and rank, {row.method}, {name}",
            )
            for row in (auto, beside)
        ]
        balances = [f"{row.scored.scenarios[number].balancedness:.3f}" for row in (auto, beside)]
        made.append(LoadMaps(name, balances[0], drawn[0], balances[1], drawn[1]))
    return made


def _traffic(auto: Row, beside: Row, objective: Objective) -> list[tuple[str, Markup]]:
    if objective.cluster.num_nodes == 1:
        return []
    rows = (auto, beside)
    largest = max(float(row.scored.traffic.max()) for row in rows)
    return [(row.method, traffic_map(row.scored.traffic, largest, f"traffic, {row.method}")) for row in rows]


def _memory(metrics: Metrics, objective: Objective) -> str:
    least = float(objective.cluster.memory.min())
    return (
        f"{units.count(metrics.memory_per_rank, 'B')} of expert weights on the fullest rank, "
        f"{metrics.memory_per_rank / least:.0%} of the smallest GPU's {units.count(least, 'B')}."
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(lambda name: files("regraft.placement").joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["seconds"] = units.seconds
    environment.filters["size"] = lambda value: units.count(value, "B")
    environment.filters["part"] = lambda value: f"{value:.1%}"
    environment.filters["fixed"] = lambda value, digits=3: f"{value:.{digits}f}"
    return environment
