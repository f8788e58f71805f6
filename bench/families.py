"""Tiny models of the 27 families of ``bench.coverage``, with random weights, and what each of them holds.

What is expected is counted while the original model runs: by module classes and by the functions that a model's own
file defines. Only this bench looks at names; regraft sees graphs.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
IMAGE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
}


@dataclass(frozen=True)
class Family:
    """One family: the config's name in ``transformers``, the model class, and settings that make it tiny."""

    name: str
    config: str
    model: str
    settings: dict[str, Any]
    image: bool = False
    decoder: bool = False
    implementations: tuple[str, ...] = ("eager", "sdpa")

    def build(self, implementation: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
        """The model in eval mode with seeded random weights."""
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        config = CONFIG_MAPPING[self.config](**self.settings)
        config.use_cache = False
        config._attn_implementation = implementation
        torch.manual_seed(seed)
        cls = getattr(transformers, self.model)
        model: nn.Module = cls._from_config(config, attn_implementation=implementation)
        _spread_norms(model, seed)
        return model.to(dtype).eval()

    def inputs(self, padded: bool, dtype: torch.dtype, batch: int = 2, length: int = 16) -> dict[str, Any]:
        """Keyword inputs; with ``padded`` an attention mask whose second row ends in padding."""
        generator = torch.Generator().manual_seed(1)
        if self.image:
            return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator).to(dtype)}
        kwargs: dict[str, Any] = {"input_ids": torch.randint(3, 128, (batch, length), generator=generator)}
        if self.decoder:
            kwargs["decoder_input_ids"] = torch.randint(3, 128, (batch, length - 4), generator=generator)
        if padded:
            mask = torch.ones(batch, length, dtype=torch.long)
            mask[1, length - 6 :] = 0
            kwargs["attention_mask"] = mask
        return kwargs


def _spread_norms(model: nn.Module, seed: int) -> None:
    """Norm weights of exactly one or zero would hide a rewrite that forgets them."""
    generator = torch.Generator().manual_seed(seed + 1)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters(recurse=False):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def text(name: str, model: str, config: str | None = None, **settings: Any) -> Family:
    """A family whose settings are named as Llama's are."""
    only_eager = settings.pop("only_eager", False)
    implementations = ("eager",) if only_eager else ("eager", "sdpa")
    return Family(name, config or name, model, {**TEXT, **settings}, implementations=implementations)


FAMILIES: tuple[Family, ...] = (
    text("llama", "LlamaForCausalLM"),
    text("mistral", "MistralForCausalLM", sliding_window=8),
    text("qwen2", "Qwen2ForCausalLM"),
    text("qwen3", "Qwen3ForCausalLM", head_dim=16),
    text("gemma2", "Gemma2ForCausalLM", head_dim=16, sliding_window=8, only_eager=True),
    text("gemma3", "Gemma3ForCausalLM", config="gemma3_text", head_dim=16, sliding_window=8, sliding_window_pattern=2),
    text("phi3", "Phi3ForCausalLM"),
    text("olmo2", "Olmo2ForCausalLM"),
    text("granite", "GraniteForCausalLM"),
    text("cohere2", "Cohere2ForCausalLM", sliding_window=8),
    text("smollm3", "SmolLM3ForCausalLM"),
    Family("gpt2", "gpt2", "GPT2LMHeadModel", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    text("gpt_neox", "GPTNeoXForCausalLM"),
    text("opt", "OPTForCausalLM", ffn_dim=96, word_embed_proj_dim=64),
    text("mixtral", "MixtralForCausalLM", **EXPERTS),
    text("qwen2_moe", "Qwen2MoeForCausalLM", **EXPERTS, shared_expert_intermediate_size=48),
    text("qwen3_moe", "Qwen3MoeForCausalLM", **EXPERTS, head_dim=16),
    text("olmoe", "OlmoeForCausalLM", **EXPERTS),
    text("deepseek_v3", "DeepseekV3ForCausalLM", **{**EXPERTS, **DEEPSEEK}),
    text("gpt_oss", "GptOssForCausalLM", **EXPERTS, head_dim=16, sliding_window=8, only_eager=True),
    text("bert", "BertModel"),
    text("roberta", "RobertaModel"),
    text("modernbert", "ModernBertModel", local_attention=8, global_attn_every_n_layers=2, cls_token_id=1,
          sep_token_id=2),
    Family(
        "t5-encoder",
        "t5",
        "T5EncoderModel",
        {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
         "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 2},
    ),
    Family("vit", "vit", "ViTModel", IMAGE, image=True),
    Family("dinov2", "dinov2", "Dinov2Model", {**IMAGE, "mlp_ratio": 2}, image=True),
    Family("siglip", "siglip_vision_model", "SiglipVisionModel", IMAGE, image=True),
)  # fmt: skip

KINDS = ("attention", "norm", "rope", "glu", "moe")


def expected_sites(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, int]:
    """How many sites of each kind the model runs through in one forward."""
    counts: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, kind=kind: counts.update([kind]))
        for module in model.modules()
        for kind in [_kind(module)]
        if kind
    ]
    with _counted_rope(model, counts), torch.no_grad():
        model(**kwargs)
    for handle in handles:
        handle.remove()
    return {kind: counts[kind] for kind in KINDS}


def _kind(module: nn.Module) -> str | None:
    name = type(module).__name__
    children = [type(child).__name__ for child in module.modules() if child is not module]
    if "Attention" in name and not any("Attention" in child for child in children):
        return "attention"
    if "Norm" in name:
        return "norm"
    if name.endswith("Experts"):
        return "moe"
    own = {child for child, _ in module.named_children()}
    if {"gate_proj", "up_proj"} <= own or "gate_up_proj" in own or {"wi_0", "wi_1"} <= own:
        return "glu"
    return "glu" if {"Wi", "Wo"} <= own and hasattr(module, "act") else None


@contextmanager
def _counted_rope(model: nn.Module, counts: Counter[str]) -> Iterator[None]:
    """Count calls of the model file's own rotary functions: each rotates a query and a key."""
    source = sys.modules[type(model).__module__]
    originals = {name: value for name, value in vars(source).items() if name.startswith("apply_rotary_pos_emb")}
    for name, function in originals.items():
        setattr(source, name, _counting(function, counts))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(source, name, function)


def _counting(function: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts["rope"] += 2
        return function(*args, **kwargs)

    return counted
