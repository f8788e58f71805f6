"""A small recording in every form that a trace may have, and the config of its model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from regraft.solvers.placement.readers.native import write_trace
from regraft.solvers.placement.synthetic import planted_trace
from regraft.solvers.placement.trace import Trace

LAYERS, EXPERTS, TOP_K = 2, 8, 2
COUNTS = np.arange(1, 1 + LAYERS * EXPERTS).reshape(LAYERS, EXPERTS)
CONFIG = {
    "model_type": "mixtral",
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
}
#: Batches of a recording in which each is another.
STEPS = [np.roll(COUNTS, step, axis=1) * (step + 1) for step in range(4)]


def trace(**facts: Any) -> Trace:
    """Tokens with two hidden groups."""
    sizes: dict[str, Any] = dict(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, groups=2, parts=2, batches=4, tokens=64)
    return planted_trace(**{**sizes, **facts}).trace


def counts_json(path: Path) -> None:
    """The form of data/moe."""
    facts = {
        "model": "m",
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "layers_recorded": list(range(LAYERS)),
        "num_model_layers": LAYERS,
        "expert_counts": {"code": COUNTS.tolist(), "law": COUNTS[:, ::-1].tolist()},
    }
    path.write_text(json.dumps(facts))


def vllm_lines(path: Path) -> None:
    """One header and a line for each batch, the last without an end of line."""
    slots = np.tile(np.arange(EXPERTS), (LAYERS, 1)).tolist()
    lines: list[dict[str, Any]] = [{"record_type": "eplb_load_meta", "version": 1}]
    lines += [{"record_type": "eplb_load_stats", "expert_load": step.tolist(), "p2l_map": slots} for step in STEPS]
    path.write_text("\n".join(map(json.dumps, lines)))


def tensorrt_folder(path: Path) -> None:
    """Counts of two ranks."""
    path.mkdir()
    (path / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": TOP_K}))
    for rank in range(2):
        counts = {f"{at}_{layer}": step[layer].copy() for at, step in enumerate(STEPS) for layer in range(LAYERS)}
        save_file(counts, path / f"rank{rank}.safetensors")


def tensorrt_choices(path: Path) -> None:
    """Choices of the tokens of two ranks."""
    path.mkdir()
    (path / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": TOP_K}))
    for rank in range(2):
        chosen = [batch.experts for batch in trace(seed=rank).batches]
        own = {f"{at}_{layer}": e[layer].copy() for at, e in enumerate(chosen) if e is not None for layer in range(2)}
        save_file(own, path / f"rank{rank}_raw.safetensors")


def sglang_steps(path: Path) -> None:
    """Counts of each step, one of them without tokens."""
    torch.save({"logical_count": torch.tensor(np.stack([*STEPS, 0 * COUNTS, COUNTS]))}, path)


def sglang_passes(path: Path) -> None:
    """Choices of each pass; a step without tokens is a dense layer's row of zeros."""
    slots = torch.tensor(np.tile(np.arange(EXPERTS), (LAYERS, 1)))
    records = [{"rank": 0, "topk_ids_of_layer": torch.tensor(batch.experts)} for batch in trace().batches]
    torch.save({"records": records, "last_physical_to_logical_map": slots}, path)


def native(ending: str) -> Callable[[Path], None]:
    """Our own file under any name."""

    def write(path: Path) -> None:
        write_trace(trace(), path.with_suffix(ending))
        path.with_suffix(ending).rename(path)

    return write


#: What ``kind_of`` calls each form, and what writes one.
FORMS: dict[str, Callable[[Path], None]] = {
    "npz": native(".npz"),
    "safetensors": native(".safetensors"),
    "counts": counts_json,
    "vllm": vllm_lines,
    "trtllm": tensorrt_folder,
    "torch": sglang_steps,
}
