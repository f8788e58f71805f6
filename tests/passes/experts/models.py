"""Tiny random models with routed experts, and random plans for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.passes.experts.permutation import Permutation
from regraft.passes.pipeline import RecognizeBlocks, RecognizeRowwise
from regraft.solvers.placement.plan import Plan
from tests.support import captured

#: Kind -> options of its config; each has its own numbers of experts, layers and choices.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_hidden_layers": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "num_hidden_layers": 3, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_hidden_layers": 2},
    "deepseek_v3": {
        "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2, "num_hidden_layers": 3,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "gpt_oss": {"num_local_experts": 5, "num_hidden_layers": 2, "sliding_window": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 6, "moe_k": 2, "num_hidden_layers": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1,
    },
}  # fmt: skip
EXPERTS = {"mixtral": 4, "qwen3_moe": 6, "olmoe": 8, "deepseek_v3": 12, "gpt_oss": 5, "ernie4_5_moe": 6}
GROUPS = {"deepseek_v3": 3}
LAYERS = {
    "mixtral": (0, 1), "qwen3_moe": (0, 1, 2), "olmoe": (0, 1), "deepseek_v3": (1, 2), "gpt_oss": (0, 1),
    "ernie4_5_moe": (1,),
}  # fmt: skip
IDS = torch.arange(1, 25).view(2, 12)


def tiny(kind: str, **options: Any) -> Any:
    """A causal language model of random fp32 weights; router biases and corrections are random too."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
        "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **FAMILIES[kind], **options})
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="batched_mm")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if isinstance(value, nn.Parameter) or name.endswith("correction_bias"):
                value.copy_(torch.randn(value.shape, generator=generator) * (0.2 if value.dim() > 1 else 1.0))
    return model.eval()


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """``[batch, tokens, vocabulary]``."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


class Logits(nn.Module):
    """A language model as a function of ids."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return found


def recognised(model: Any, args: tuple[Any, ...], dynamic: Any = None) -> Program:
    """The canonical program with its experts recognised."""
    program = captured(model, args, dynamic)
    for item in (RecognizeRowwise(), RecognizeBlocks()):
        item.run(program, Session(verify="off"))
    return program


def random_order(experts: int, seed: int, groups: int = 1) -> tuple[int, ...]:
    """A permutation that keeps router groups whole; never the identity."""
    random = np.random.default_rng(seed)
    while True:
        blocks = random.permutation(experts).reshape(1, -1)
        if groups > 1:
            size = experts // groups
            blocks = np.stack([number * size + random.permutation(size) for number in random.permutation(groups)])
        if (blocks.reshape(-1) != np.arange(experts)).any():
            return tuple(int(expert) for expert in blocks.reshape(-1))


def random_plan(kind: str, seed: int, ranks: int = 1, groups: int | None = None) -> Plan:
    """A plan without replicas for every expert layer of a family; ``groups`` 1 crosses router groups."""
    kept = GROUPS.get(kind, 1) if groups is None else groups
    experts, layers = EXPERTS[kind], LAYERS[kind]
    array = np.array([random_order(experts, 100 * seed + layer, kept) for layer in layers])
    return Plan.of_array(array, experts, ranks, layers)


def relative(new: Tensor, old: Tensor) -> float:
    """Relative L2 error."""
    return float((new - old).norm() / old.norm())


class HandWritten(nn.Module):
    """A block with everything along the expert axis: bias, temperature, correction, and a scale looked up by expert."""

    def __init__(self, experts: int = 6, hidden: int = 10, inner: int = 12, top_k: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def draw(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=generator))

        self.top_k = top_k
        self.rows, self.bias = draw(experts, hidden), draw(experts)
        self.temperature = nn.Parameter(draw(1, experts).detach().abs() + 0.5)
        self.correction, self.scale = draw(experts), draw(experts)
        self.first, self.down = draw(experts, 2 * inner, hidden), draw(experts, hidden, inner)

    def scores(self, x: Tensor) -> Tensor:
        """``[tokens, experts]``."""
        return torch.sigmoid(torch.nn.functional.linear(x, self.rows, self.bias) / self.temperature)

    def choose(self, scores: Tensor) -> Tensor:
        """``[tokens, top_k]``."""
        return torch.topk(scores + self.correction, self.top_k, dim=-1).indices

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        index = self.choose(scores)
        weight = scores.gather(-1, index)
        weight = weight / weight.sum(-1, keepdim=True) * self.scale[index]
        ids = index.reshape(-1)
        packed = torch.bmm(self.first[ids], x.repeat_interleave(self.top_k, 0).unsqueeze(-1)).squeeze(-1)
        gate, up = packed.chunk(2, dim=-1)
        out = torch.bmm(self.down[ids], (torch.nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (out * weight.reshape(-1, 1)).view(x.shape[0], self.top_k, x.shape[1]).sum(1)


def permutations(plan: Plan) -> list[Permutation]:
    """One for each layer of the plan."""
    return [Permutation(tuple(int(expert) for expert in row)) for row in plan.array]
