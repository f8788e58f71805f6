"""A routing trace of any form, and holding it against the model that it is said to be of."""

from __future__ import annotations

import json
from pathlib import Path

from regraft.placement.sglang import SglangTrace
from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.readers.counts_json import read_counts_json
from regraft.solvers.placement.readers.kinds import kind_of
from regraft.solvers.placement.readers.native import NativeTrace
from regraft.solvers.placement.readers.stored import Held, Stored
from regraft.solvers.placement.readers.tensorrt_llm import TensorRtTrace
from regraft.solvers.placement.readers.vllm import VllmTrace
from regraft.solvers.placement.statistics import Statistics


def read_model(path: Path, weight_type: str = "bf16") -> MoeModel:
    """The expert layers that a Hugging Face ``config.json``, or a folder with one, describes. Raises
    ``PlacementError``.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlacementError(f"config {str(path)!r} cannot be read: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlacementError(f"config {file.name!r} is no JSON: {error}; expected a model's config.json") from error
    if not isinstance(config, dict):
        raise PlacementError(f"config {file.name!r} holds a {type(config).__name__}; expected a model's config.json")
    try:
        return MoeModel.from_config(config, weight_type)
    except (TypeError, AttributeError) as error:
        raise PlacementError(f"config {file.name!r} has a value of the wrong kind: {error}") from error


def stored_trace(path: Path, model: MoeModel | None = None, top_k: int | None = None) -> Stored:
    """A trace whose form is told by its content, looked into but not read.

    ``model`` names the expert layers where the trace does not, and experts per token; ``top_k`` the latter alone.
    Raises ``PlacementError`` for what cannot be read, and where neither says what the trace leaves open.
    """
    kind = kind_of(path)
    if kind in ("npz", "safetensors"):
        return NativeTrace.open(path)
    if kind == "counts":
        return Held(read_counts_json(path))
    if kind == "trtllm":
        return TensorRtTrace.open(path)
    chosen = top_k if model is None else model.top_k
    if chosen is None:
        raise PlacementError(
            f"{path.name!r} does not say how many experts a token takes; expected the model's config or that number: "
            "pass --config or --top-k"
        )
    layers = None if model is None else model.layer_ids
    return VllmTrace.open(path, chosen, layers) if kind == "vllm" else SglangTrace.open(path, chosen, layers)


def model_of(trace: Statistics, model: MoeModel | None = None) -> MoeModel:
    """``model`` after it was held against the trace; without one, the trace's own sizes and experts as large as
    DeepSeek-V3's. Raises ``PlacementError`` where they differ.
    """
    if model is None:
        return MoeModel(trace.num_experts, trace.top_k, trace.layer_ids, trace.num_hidden_layers, name=trace.model_name)
    for what, given, expected in (
        ("experts in a layer", trace.num_experts, model.num_experts),
        ("experts per token", trace.top_k, model.top_k),
    ):
        if given != expected:
            raise PlacementError(
                f"the trace has {given} {what} and the config {expected}: the trace is of another model; "
                "pass the config of the model that was recorded"
            )
    missing = sorted(set(model.layer_ids) - set(trace.layer_ids))
    beyond = sorted(set(trace.layer_ids) - set(model.layer_ids))
    if missing:
        raise PlacementError(
            f"the trace misses {len(missing)} of the config's {model.num_layers} expert layers (layer {missing[0]} "
            "first); expected all of them; record again, or leave the config out to plan the recorded layers alone"
        )
    if beyond:
        raise PlacementError(
            f"the trace has layer {beyond[0]}, which is no expert layer of the config's model; "
            "pass the config of the model that was recorded"
        )
    return model
