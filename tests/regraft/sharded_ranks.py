"""What every rank of ``test_sharded.py`` runs, under torchrun with four processes: each case leaves its findings in
``FOLDER/rank<r>.json`` by name; the test reads them. Cases that are wrong show in the findings, not as exceptions."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import regraft
from regraft.errors import RegraftError
from regraft.ir.ops import moe, moe_combine, moe_dispatch
from regraft.passes.experts.sharding import Sharding
from regraft.permute import permute_checkpoint
from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.traffic import plan_traffic
from tests.passes.experts.models import (
    GROUPS,
    HandWritten,
    Logits,
    logits,
    permutations,
    random_order,
    relative,
    tiny,
)

RANKS = 4
TWO_NODES = Cluster.uniform(2, 2)
#: Family -> how its plan is run. Each has replicas and an empty slot.
RUN: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"split": "nearest", "cluster": TWO_NODES},
    "olmoe": {"communication": "per-expert"},
    "deepseek_v3": {},
}
#: Fewer layers than in tests of one process, and numbers of experts that four ranks divide, as transformers wants.
OPTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_hidden_layers": 2},
    "qwen3_moe": {"num_experts": 8, "num_hidden_layers": 1},
    "olmoe": {"num_hidden_layers": 1},
    "deepseek_v3": {"num_hidden_layers": 2},
}
EXPERTS = {"mixtral": 4, "qwen3_moe": 8, "olmoe": 8, "deepseek_v3": 12}
LAYERS = {"mixtral": (0, 1), "qwen3_moe": (0,), "olmoe": (0,), "deepseek_v3": (1,)}


def replicated(experts: int, layers: tuple[int, ...], ranks: int, seed: int = 0) -> Plan:
    """Every expert somewhere, some twice, and an empty slot; expert 0 on rank 0 in the first layer."""
    random = np.random.default_rng(seed)
    slots = -(-(experts + 3) // ranks)
    rows = []
    for _ in layers:
        more = random.integers(0, experts, ranks * slots - experts - 1)
        rows.append(random.permutation([*range(experts), *more, -1]))
    return Plan.of_array(np.array(rows), experts, ranks, layers)


class Choices(TorchDispatchMode):
    """The experts that a model's own routers choose: every ``topk`` of this many experts and choices."""

    def __init__(self, experts: int, top_k: int) -> None:
        super().__init__()
        self.size = experts, top_k
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.topk.default and (args[0].shape[-1], args[1]) == self.size:
            self.found.append(out[1].reshape(-1, args[1]))
        return out


def predicted(sharding: Sharding, chosen: Tensor) -> list[list[list[int]]]:
    """Copies ``[layers, source, destination]`` that the plan foretells for all ranks' choices ``[layers, tokens, k]``,
    tokens numbered in their own rank's call."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, chosen.numpy())
    sources = np.repeat(np.arange(len(everyone)), [part.shape[1] for part in everyone])
    numbers = np.concatenate([np.arange(part.shape[1]) for part in everyone])
    traffic = plan_traffic(
        sharding.plan,
        np.concatenate(everyone, axis=1),
        sharding.cluster or Cluster.uniform(1, len(everyone)),
        sources,
        sharding.split,
        sharding.communication,
        tokens=numbers,
    )
    return [layer.ranks.tolist() for layer in traffic]


def crossed(count: Any, layers: tuple[int, ...]) -> list[list[int]]:
    """Rows that this rank sent to each other one, by layer."""
    rank = dist.get_rank()
    return [[0 if to == rank else rows for to, rows in enumerate(count.sent(layer))] for layer in layers]


def ids_of(rank: int) -> Tensor:
    """Another number of sequences and tokens on every rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(1, 32, (1 + rank % 3, 4 + 3 * rank), generator=generator)


def family(kind: str) -> Callable[[Path], dict[str, Any]]:
    """A model sharded by a plan with replicas: its error, and copies beside what the plan foretold."""

    def case(folder: Path) -> dict[str, Any]:
        own = tiny(kind, **OPTIONS[kind])
        model, ids = Logits(own).eval(), ids_of(dist.get_rank())
        sharding = Sharding(replicated(EXPERTS[kind], LAYERS[kind], RANKS), **RUN[kind])
        top_k = own.config.num_experts_per_tok
        with Choices(EXPERTS[kind], top_k) as choices, torch.no_grad():
            expected = model(ids)
        verify = {"olmoe": "each", "qwen3_moe": "final"}.get(kind, "off")  # time; what is compared here counts
        fast = regraft.compile(model, (ids,), experts=sharding, verify=verify)
        with regraft.count_copies() as count:
            error = relative(fast(ids), expected)
        return {
            "error": error,
            "drift": fast.report.end_to_end_drift,
            "crossed": crossed(count, LAYERS[kind]),
            "predicted": predicted(sharding, torch.stack(choices.found)),
            "chosen": all(
                torch.equal(call.chosen, index) for call, index in zip(count.calls, choices.found, strict=True)
            ),
            "events": [event.reason for event in fast.report.events],
        }

    return case


def rows_of(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[tokens, 10]`` of this rank."""
    return torch.randn(tokens, 10, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)


def low_precision(folder: Path) -> dict[str, Any]:
    """bf16 beside the same model compiled without a plan: only the order of sums may differ."""
    model = HandWritten().to(torch.bfloat16).eval()
    x = rows_of(3 + dist.get_rank(), torch.bfloat16)
    fast = regraft.compile(model, (x,), experts=replicated(6, (0,), RANKS))
    with regraft.count_copies() as count:
        out = fast(x)
    sharding = Sharding(replicated(6, (0,), RANKS))
    return {
        "error": relative(out.float(), regraft.compile(model, (x,))(x).float()),
        "dtype": str(out.dtype),
        "crossed": crossed(count, (0,)),
        "predicted": predicted(sharding, count.calls[0].chosen[None]),
    }


def changing_sizes(folder: Path) -> dict[str, Any]:
    """Symbolic sizes, then calls of other sizes on every rank, one of them without a token, one recaptured."""
    rank, model = dist.get_rank(), HandWritten().eval()
    fast = regraft.compile(model, (rows_of(4 + rank),), experts=replicated(6, (0,), RANKS), dynamic=True)
    errors = []
    for tokens in ([9, 2, 5, 3], [6, 0, 7, 2], [1, 3, 0, 0], [2, 8, 4, 9]):
        x = rows_of(tokens[rank])
        with torch.no_grad():
            errors.append(float((fast(x) - model(x)).abs().sum()))
    return {"errors": errors, "events": [event.kind for event in fast.report.events]}


def operators(folder: Path) -> dict[str, Any]:
    """Random tables and choices over groups of two, three and four ranks, some without tokens, some never chosen."""
    rank, worst, random = dist.get_rank(), 0.0, np.random.default_rng(5)
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    for number in range(24):
        size, experts, top_k = 2 + number % 3, int(random.integers(1, 9)), int(random.integers(1, 4))
        sharding = Sharding(
            replicated(experts, (0,), size, number), ("even", "nearest")[number % 2],
            ("dispatch", "per-expert")[number // 2 % 2],
        )  # fmt: skip
        counts = random.integers(0, 7, size)
        if rank >= size:
            continue
        generator = torch.Generator().manual_seed(100 * number + rank)
        tokens, alike = int(counts[rank]), torch.Generator().manual_seed(number)
        hidden = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
        index = torch.randint(-1, 1 if number % 5 == 0 else experts + 1, (tokens, top_k), generator=generator)
        weight = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
        first = torch.randn(experts, 12, 8, generator=alike, dtype=torch.float64)
        down = torch.randn(experts, 8, 6, generator=alike, dtype=torch.float64)
        held = torch.tensor(sharding.held(0, rank), dtype=torch.int64)
        where = {"ranks": size, "rank": rank, "group": groups[size].group_name}
        rows, slot, shares, token, sent = moe_dispatch(
            hidden, index, weight, torch.from_numpy(sharding.copies(0, rank).copy()),
            slots=sharding.plan.slots_per_rank[0], per_choice=sharding.communication == "per-expert", **where,
        )  # fmt: skip
        results = moe(rows, slot, shares, first[held], down[held])
        out = moe_combine(results, token, sent, tokens, dtype=torch.float64, **where)
        worst = max(worst, float((out - moe(hidden, index, weight, first, down)).abs().sum()))
    return {"error": worst}


def artifacts(folder: Path) -> dict[str, Any]:
    """Artifacts that one process wrote rank by rank: each runs as its own rank, and says so as another."""
    rank, model, x = dist.get_rank(), HandWritten().eval(), rows_of(5)
    fast = regraft.load(folder / f"{rank}.regraft")
    with torch.no_grad():
        error = relative(fast(x), model(x))
    fast.report.to_json()
    said = refusal(lambda: regraft.load(folder / f"{(rank + 1) % RANKS}.regraft"))
    few = refusal(lambda: regraft.load(folder / "of-two.regraft"))
    return {"error": error, "another": said, "of two": few}


def saved(folder: Path) -> dict[str, Any]:
    """What a rank compiles in the group is saved and loaded; the original's weights can go."""
    rank, model, x = dist.get_rank(), HandWritten().eval(), rows_of(5)
    with torch.no_grad():
        expected = model(x)
    fast = regraft.compile(model, (x,), experts=replicated(6, (0,), RANKS))
    fast.save(folder / f"own{rank}.regraft")
    fast.free_original()
    loaded = regraft.load(folder / f"own{rank}.regraft")
    return {"freed": relative(fast(x), expected), "loaded": relative(loaded(x), expected)}


def together(folder: Path) -> dict[str, Any]:
    """What one rank cannot do, none does; what cannot run sharded is refused instead of run by one rank alone."""
    rank, model, x = dist.get_rank(), HandWritten().eval(), rows_of(4)
    plan = replicated(6, (0,), RANKS)

    def fails() -> Any:
        wrong = HandWritten(hidden=9).eval() if rank == 2 else model
        return regraft.compile(wrong, (x,), experts=plan)

    def differs() -> Any:
        return regraft.compile(model, (x,), experts=replicated(6, (0,), RANKS, seed=int(rank == 3)))

    def alone() -> Any:
        fast = regraft.compile(model, (x,), experts=plan)
        with torch.autocast("cpu"):
            return fast(x)

    return {
        "fails": refusal(fails),
        "differs": refusal(differs),
        "alone": refusal(alone),
        "size": refusal(lambda: regraft.compile(model, (x,), experts=replicated(6, (0,), 3))),
        "rank": refusal(lambda: regraft.compile(model, (x,), experts=Sharding(plan, rank=(rank + 1) % RANKS))),
    }


def transformers_experts(kind: str) -> Callable[[Path], dict[str, Any]]:
    """The permuted checkpoint under transformers' own expert parallelism, beside the original model."""

    def case(folder: Path) -> dict[str, Any]:
        import transformers
        from transformers.distributed import DistributedConfig

        model, experts = tiny(kind, **OPTIONS[kind]), EXPERTS[kind]
        rows = [random_order(experts, layer, GROUPS.get(kind, 1)) for layer in LAYERS[kind]]
        plan = Plan.of_array(np.array(rows), experts, RANKS, LAYERS[kind])
        if dist.get_rank() == 0:
            model.save_pretrained(folder / kind)
            permute_checkpoint(folder / kind, plan, folder / f"{kind}-permuted")
        dist.barrier()
        spread = transformers.AutoModelForCausalLM.from_pretrained(
            folder / f"{kind}-permuted", distributed_config=DistributedConfig(tp_size=RANKS, ep_size=RANKS)
        ).eval()
        whole, part = (
            next(value for name, value in found.named_parameters() if name.endswith("experts.gate_up_proj"))
            for found in (model, spread)
        )
        order, each = permutations(plan)[0].order, experts // RANKS
        held = list(order[dist.get_rank() * each : (dist.get_rank() + 1) * each])
        local = part.to_local() if hasattr(part, "to_local") else part
        return {"error": relative(logits(spread), logits(model)), "placed": torch.equal(local, whole[held])}

    return case


def refusal(call: Callable[[], Any]) -> str:
    """What a call that must not succeed says."""
    try:
        call()
    except RegraftError as error:
        return f"{type(error).__name__}: {error}"
    return "it succeeded"


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{kind: family(kind) for kind in RUN},
    "low precision": low_precision,
    "changing sizes": changing_sizes,
    "operators": operators,
    "artifacts": artifacts,
    "saved": saved,
    "together": together,
}
TRANSFORMERS = {f"transformers {kind}": transformers_experts(kind) for kind in RUN}


def main(folder: Path) -> None:
    """Run every case on this rank."""
    torch.set_num_threads(1)
    logging.getLogger("regraft").setLevel(logging.ERROR)
    dist.init_process_group("gloo", timeout=timedelta(minutes=3))  # ranks that wait in vain do not stay behind
    cases = {**CASES, **(TRANSFORMERS if find_spec("accelerate") else {})}
    found = {name: case(folder) for name, case in cases.items()}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
