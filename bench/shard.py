"""``torchrun --nproc-per-node 4 -m bench.shard``: experts sharded over ranks beside the same model in one process.

Every rank compiles each family by a plan with replicas, on inputs of its own size, and calls it once. The table shows
the largest relative L2 error of any rank against the model itself and against the model compiled without a plan, the
token copies that crossed between ranks beside those that the plan predicts for the same choices, and the bytes of the
experts that the fullest rank holds beside all of them. A row passes when every pair of ranks exchanged exactly what was
predicted and the error is at most 1e-5 against the model (fp32) or 1e-2 against the compiled one (bf16, where the
model's own choices of experts may already flip). Exit status 1 when a row does not pass.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import regraft
from bench.families import FAMILIES, Family
from bench.more_families import OTHERS
from bench.timing import write_record
from regraft.ir.capture import capture
from regraft.ir.copies import CopyCount
from regraft.ir.nodes import arguments
from regraft.ir.ops import moe
from regraft.ir.program import Program
from regraft.passes.experts.sharding import COMMUNICATIONS
from regraft.record import Recorder
from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.split import SPLITS
from regraft.solvers.placement.traffic import plan_traffic

ISSUE = "mixtral,qwen3_moe,olmoe,deepseek_v3"
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Row:
    """One family. Bytes are of the experts of all layers: of the fullest rank, and of the model."""

    family: str
    dtype: str
    error: float
    error_compiled: float
    crossed: int
    predicted: int
    exact: bool
    rank_bytes: int
    model_bytes: int

    @property
    def passed(self) -> bool:
        """Whether the row keeps its bounds."""
        return self.exact and (self.error <= 1e-5 if self.dtype == "float32" else self.error_compiled <= 1e-2)


def measure(family: Family, options: argparse.Namespace) -> Row:
    """One row, the same on every rank; all ranks call this."""
    dtype: torch.dtype = getattr(torch, options.dtype)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = family.build(family.implementations[-1], dtype)
    inputs = family.inputs(False, dtype, batch=1 + rank % 3, length=8 + 5 * rank)
    recorder = Recorder(capture(model, (), inputs), inputs["input_ids"])
    plan = random_plan(recorder.num_experts, recorder.layer_ids, ranks, options.redundant, options.seed)
    cluster = Cluster.uniform(2, ranks // 2) if options.split == "nearest" and ranks % 2 == 0 else None
    sharding = regraft.Sharding(plan, options.split, options.communication, cluster)
    plain = regraft.compile(model, kwargs=inputs)(**inputs).logits
    with torch.no_grad():
        own = model(**inputs).logits
    fast = regraft.compile(model, kwargs=inputs, experts=sharding)
    with regraft.count_copies() as count:
        given = fast(**inputs).logits
    chosen = np.stack([call.chosen.numpy() for call in count.calls])
    if dtype == torch.float32:  # what another program of the model chose, not what was sent
        chosen = recorder.batch(inputs["input_ids"]).experts
    predicted, crossed = predict(sharding, chosen), sent(count, plan.layer_ids)
    held = expert_bytes(fast.entries[0].program)
    sizes = [sum(of_rank) for of_rank in gathered(held)]
    whole = sum(part * plan.num_experts // len(sharding.held(at, rank)) for at, part in enumerate(held))
    return Row(
        family.name,
        options.dtype,
        max(gathered(error(given, own))),
        max(gathered(error(given, plain))),
        int(crossed.sum()),
        int(predicted.sum()),
        bool((crossed == predicted).all()),
        max(sizes),
        whole,
    )


def random_plan(experts: int, layers: tuple[int, ...], ranks: int, redundant: int, seed: int) -> Plan:
    """Every expert once and ``redundant`` of them again, in random places; as many slots on each rank."""
    random = np.random.default_rng(seed)
    slots = -(-(experts + redundant) // ranks)
    more = slots * ranks - experts
    rows = [random.permutation([*range(experts), *random.integers(0, experts, more)]) for _ in layers]
    return Plan.of_array(np.array(rows), experts, ranks, layers)


def predict(sharding: regraft.Sharding, chosen: np.ndarray) -> np.ndarray:
    """``[layers, source, destination]`` for the choices ``[layers, tokens, top_k]`` of all ranks."""
    everyone = gathered(chosen)
    traffic = plan_traffic(
        sharding.plan,
        np.concatenate(everyone, axis=1),
        sharding.cluster or Cluster.uniform(1, len(everyone)),
        np.repeat(np.arange(len(everyone)), [part.shape[1] for part in everyone]),
        sharding.split,
        sharding.communication,
        tokens=np.concatenate([np.arange(part.shape[1]) for part in everyone]),
    )
    return np.stack([layer.ranks for layer in traffic])


def sent(count: CopyCount, layers: tuple[int, ...]) -> np.ndarray:
    """``[layers, source, destination]`` that really crossed."""
    table = np.stack(gathered(np.array([count.sent(layer) for layer in layers])), axis=1)
    for layer in table:
        np.fill_diagonal(layer, 0)
    return table


def expert_bytes(program: Program) -> list[int]:
    """Bytes of the expert weights of each site, in the order of the graph."""
    names = ("first", "down", "up", "first_bias", "down_bias", "up_bias")
    sites = [arguments(node) for node in program.graph.nodes if node.target is moe]
    tensors = [
        [program.weights.get(str(program.weight_name(site[name]))) for name in names if site[name]] for site in sites
    ]
    return [sum(tensor.nbytes for tensor in site) for site in tensors]


def error(given: Tensor, wanted: Tensor) -> float:
    """Relative L2."""
    return float((given.double() - wanted.double()).norm() / wanted.double().norm())


def gathered(value: Any) -> list[Any]:
    """The value of every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def show(rows: list[Row], title: str) -> Table:
    """The table of all rows."""
    table = Table(title=title)
    for column in ("family", "dtype", "error", "beside compiled", "crossed", "predicted", "rank MB", "model MB", ""):
        table.add_column(column)
    for row in rows:
        errors = f"{row.error:.1e}", f"{row.error_compiled:.1e}"
        sizes = f"{row.rank_bytes / 1e6:.3f}", f"{row.model_bytes / 1e6:.3f}"
        counts = str(row.crossed), str(row.predicted)
        table.add_row(row.family, row.dtype, *errors, *counts, *sizes, "ok" if row.passed else "FAILS")
    return table


def main() -> int:
    """Measure on all ranks; rank 0 prints and, with ``--json``, records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=ISSUE, help="comma-separated names of bench.families or more_families")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--split", default="even", choices=SPLITS)
    parser.add_argument("--communication", default="dispatch", choices=COMMUNICATIONS)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--redundant", type=int, default=4, help="slots beyond one for each expert")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    options = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error("one process was started without torchrun; run torchrun --nproc-per-node 4 -m bench.shard")
    logging.getLogger("regraft").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    known = {family.name: family for family in (*FAMILIES, *OTHERS)}
    rows = [measure(_sized(known[name], options.experts), options) for name in options.families.split(",")]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    if rank == 0:
        how = f"split {options.split}, {options.communication}"
        Console(width=130).print(show(rows, f"experts sharded over {ranks} ranks (gloo), {how}"))
        if options.json is not None:
            command = f"torchrun --nproc-per-node {ranks} -m bench.shard {' '.join(sys.argv[1:])}".strip()
            results = [{**asdict(row), "passed": row.passed} for row in rows]
            write_record("shard", {"command": command, "ranks": ranks, "rows": results}, options.json)
    return 0 if all(row.passed for row in rows) else 1


def _sized(family: Family, experts: int) -> Family:
    counts = {name: experts for name in _COUNTS if name in family.settings}
    return replace(family, settings={**family.settings, **counts})


if __name__ == "__main__":
    sys.exit(main())
