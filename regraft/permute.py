"""Permuting the experts of a checkpoint by a placement plan, so that any engine that cuts experts into contiguous
blocks loads the placement; the model computes what it did."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.checkpoint.copy import Piece, appearing, rows, whole, write_shard
from regraft.checkpoint.experts import ExpertLayer, find_layers
from regraft.checkpoint.shards import read_shards
from regraft.errors import SourceError
from regraft.passes.experts.errors import PermutationError
from regraft.passes.experts.permutation import Permutation, permutations_of
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.plan import Plan

#: Names that configs give to the number of router groups, and to how many of them a token may use.
_GROUPS = ("n_group", "num_expert_group", "num_expert_groups", "n_expert_groups", "moe_num_groups")
_GROUPS_USED = ("topk_group", "topk_groups", "num_limited_groups", "n_limited_groups")


@dataclass(frozen=True)
class PermutedCheckpoint:
    """What was written. ``layers`` were permuted; ``untouched`` are expert layers beyond the model's own (multi-token
    prediction); ``moved`` counts experts that lie in another slot than before, over all layers; sizes in bytes."""

    folder: Path
    layers: tuple[int, ...]
    untouched: tuple[int, ...]
    experts: int
    moved: int
    tensors: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "output": os.fspath(self.folder),
            "layers": list(self.layers),
            "untouched_layers": list(self.untouched),
            "experts": self.experts,
            "experts_moved": self.moved,
            "tensors_permuted": self.tensors,
            "bytes": self.nbytes,
        }


def permute_checkpoint(
    checkpoint: str | os.PathLike[str],
    plan: Plan,
    output: str | os.PathLike[str],
    done: Callable[[int], None] = lambda nbytes: None,
) -> PermutedCheckpoint:
    """Write the checkpoint with the experts of each layer in the order of the plan's slots.

    ``checkpoint`` is a Hugging Face folder (config.json and safetensors). ``output`` is a new folder, which appears
    whole or not at all. ``done`` is called with the bytes of each tensor written. Raises ``PermutationError`` where the
    plan does not fit the model or crosses its router groups, and ``SourceError`` for a checkpoint that is not whole.
    """
    folder, target = Path(checkpoint), Path(output)
    orders = permutations_of(plan)
    config = read_config(folder)
    model = _model(folder, config)
    shards = read_shards(folder)
    if target.resolve() == folder.resolve() or folder.resolve() in target.resolve().parents:
        raise SourceError(f"the output {target} lies in the checkpoint {folder}; give a folder elsewhere")
    hidden = int(config.get("text_config", config)["hidden_size"])
    stored = [tensor for shard in shards for tensor in shard.tensors]
    layers = find_layers(stored, model.num_experts, hidden)
    _check(plan, model, layers)
    own = [layer for layer in layers if layer.layer < model.num_hidden_layers]
    check_groups(config, orders)
    sources: dict[str, list[Piece]] = {}
    for layer in own:
        sources.update(_sources(layer, orders[layer.layer]))
    with appearing(target) as temporary:
        _copy_others(folder, temporary, {shard.path.name for shard in shards})
        for shard in shards:
            write_shard(shard, temporary / shard.path.name, sources, done)
    moved = sum(at != expert for layer in own for at, expert in enumerate(orders[layer.layer].order))
    return PermutedCheckpoint(
        target,
        tuple(layer.layer for layer in own),
        tuple(layer.layer for layer in layers if layer not in own),
        model.num_experts,
        moved,
        len(sources),
        sum(tensor.nbytes for tensor in stored),
    )


def tensor_count(checkpoint: str | os.PathLike[str]) -> int:
    """How many tensors a checkpoint holds, for a progress bar. Raises ``SourceError``."""
    return sum(len(shard.tensors) for shard in read_shards(Path(checkpoint)))


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``. Raises ``SourceError``."""
    path = folder / "config.json"
    if not folder.is_dir() or not path.is_file():
        raise SourceError(f"there is no {path}; give a Hugging Face folder (config.json and safetensors)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read ({error}); it must be a JSON object") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} holds no JSON object; it must be the config of a Hugging Face model")
    return config


def check_groups(config: dict[str, Any], orders: dict[int, Permutation]) -> None:
    """Raise ``PermutationError`` where a permutation crosses the groups of a group-limited router."""
    text = config.get("text_config", config)
    groups = next((int(text[name]) for name in _GROUPS if text.get(name)), 1)
    used = next((int(text[name]) for name in _GROUPS_USED if text.get(name)), 0)
    if groups == 1 or used == groups:
        return
    for layer, order in orders.items():
        try:
            order.of_blocks(groups)
        except PermutationError as error:
            raise PermutationError(f"layer {layer}: {error}") from error


def _model(folder: Path, config: dict[str, Any]) -> MoeModel:
    try:
        facts = {"top_k": 1, **config.get("text_config", config)}  # how many experts a token uses is of no matter here
        return MoeModel.from_config(facts)
    except (PlacementError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"the config of {folder} does not describe routed experts: {error}") from error


def _check(plan: Plan, model: MoeModel, layers: Iterable[ExpertLayer]) -> None:
    if plan.num_experts != model.num_experts:
        raise PermutationError(
            f"the plan is for {plan.num_experts} experts and the model has {model.num_experts}; plan for this model"
        )
    held = {layer.layer for layer in layers if layer.layer < model.num_hidden_layers}
    missing, foreign = sorted(held - set(plan.layer_ids)), sorted(set(plan.layer_ids) - held)
    if missing:
        raise PermutationError(
            f"the plan has no entry for expert layer {missing[0]} of the model ({len(missing)} missing); "
            "plan for every expert layer"
        )
    if foreign:
        raise PermutationError(
            f"the plan places experts in layer {foreign[0]}, where the model has none ({len(foreign)} such layers); "
            "plan with the true positions of the expert layers"
        )


def _sources(layer: ExpertLayer, order: Permutation) -> dict[str, list[Piece]]:
    """Where the data of each tensor that changes come from."""
    found = {tensor.name: rows(tensor, order.order) for tensor in (*layer.stacked, *layer.rows)}
    for copies in layer.numbered.values():
        found |= {copies[slot].name: whole(copies[expert]) for slot, expert in enumerate(order.order)}
    return found


def _copy_others(folder: Path, target: Path, shards: set[str]) -> None:
    """Everything but the shards, as it is."""
    for path in folder.iterdir():
        if path.name in shards:
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        elif path.is_file():
            shutil.copy2(path, target / path.name)
