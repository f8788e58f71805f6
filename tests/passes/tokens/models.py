"""Tiny encoders with random weights, and reading what a program computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.passes.canonicalize.cleanup import DropDeadCode, MergeCommonSubexpressions
from regraft.passes.canonicalize.pipeline import canonicalize
from regraft.passes.pipeline import RecognizeBlocks, RecognizeRowwise

_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64, "image_size": 32, "patch_size": 8, "pad_token_id": 0, "mlp_ratio": 2,
}  # fmt: skip
#: Kind -> its own settings. Other kinds are given all of theirs.
IMAGE_KINDS: dict[str, dict[str, Any]] = {
    "vit": {},
    "deit": {},
    "dinov2": {},
    "siglip_vision_model": {},
    "clip_vision_model": {},
    "beit": {"use_relative_position_bias": True},
}
TEXT_KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
}


def tiny(kind: str, implementation: str = "sdpa", **options: Any) -> nn.Module:
    """A model of a Hugging Face family in eval mode; equal seeds, equal weights."""
    transformers = pytest.importorskip("transformers")
    own = {**IMAGE_KINDS, **TEXT_KINDS}.get(kind)
    config = transformers.AutoConfig.for_model(kind, **{**({} if own is None else {**_SIZES, **own}), **options})
    torch.manual_seed(0)
    found = transformers.AutoModel.from_config(config, attn_implementation=implementation)
    for parameter in found.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)  # norms of ones would hide a mistake
    model: nn.Module = found.eval()
    return model


def images(batch: int = 2, size: int = 32) -> dict[str, Tensor]:
    """Random pixels."""
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))}


def texts(lengths: tuple[int, ...] = (16, 10), length: int = 16) -> dict[str, Tensor]:
    """Random ids, each row padded behind its own length."""
    ids = torch.randint(3, 64, (len(lengths), length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length)[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def recognised(model: nn.Module, kwargs: dict[str, Tensor] | tuple[Tensor, ...], dynamic: Any = None) -> Program:
    """The program at the point where tokens are reduced."""
    given = ((), kwargs) if isinstance(kwargs, dict) else (kwargs, {})
    program = capture(model.eval(), *given, dynamic=dynamic)
    canonicalize(program, Session(verify="off"))
    for item in (RecognizeRowwise(), RecognizeBlocks(), MergeCommonSubexpressions(), DropDeadCode()):
        item.run(program, Session(verify="off"))
    return program


def outputs(program: Program, *flat: Any) -> list[Tensor]:
    """The flat outputs on the example, or on other flat inputs."""
    found = program.callable()(*(flat or program.example))
    return [value for value in found if isinstance(value, Tensor)]


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def values(program: Program) -> dict[fx.Node, Any]:
    """What every node computes on the example."""
    users = dict(zip((node.name for node in program.user_inputs()), program.example, strict=True))
    held = [
        users[node.name] if name is None else program.weights.get(name)
        for node in program.graph.nodes
        if node.op == "placeholder"
        for name in [program.weight_name(node)]
    ]
    recorder = _Recorder(program.module)
    with torch.no_grad():
        recorder.run(*held)
    return recorder.values


def relative(value: Tensor, reference: Tensor) -> float:
    """Relative L2 distance."""
    return float((value.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30))
