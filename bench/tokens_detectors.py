"""Tiny detectors for ``bench.tokens_legality``: convolutions, an encoder over their pixels, object queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 32  # pixels of the image that become one token
_LOUDER = 8  # weights of an untrained detector are so small that its boxes depend on no image
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_DETR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5,
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip
_RT_DETR = {
    "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [12, 16, 24], "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_in_channels": [32, 32, 32], "decoder_layers": 2, "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4, "decoder_n_points": 2, "num_queries": 5,
}  # fmt: skip


def settings(kind: str) -> dict[str, Any]:
    """The settings of a detector of the family ``kind``."""
    import transformers

    if kind == "rt_detr":
        stages = ["stage2", "stage3", "stage4"]
        return {**_RT_DETR, "backbone_config": transformers.RTDetrResNetConfig(**_STAGES, out_features=stages)}
    return {**_DETR, "backbone_config": transformers.ResNetConfig(**_STAGES, out_features=["stage4"])}


def forget_places(model: nn.Module) -> None:
    """Convolutions see one pixel each, and positions are zero, so that equal blocks of an image are equal tokens."""
    for parameter in model.parameters():
        if parameter.dim() == 4 and parameter.shape[-1] > 1:
            middle = parameter.shape[-1] // 2
            kept = parameter.data[:, :, middle, middle].clone()
            parameter.data.zero_()[:, :, middle, middle] = kept
        if parameter.dim() > 1:
            parameter.data *= _LOUDER
    for module in model.modules():
        if "SinePositionEmbedding" in type(module).__name__:
            module.register_forward_hook(lambda _module, _inputs, made: torch.zeros_like(made))


def blocks() -> tuple[Tensor, ...]:
    """Images of 4x4 blocks of two kinds, moved so that the pixel that a token sees lies inside its block."""
    colours = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    columns = colours[:, :, [0, 0, 1, 1]].repeat_interleave(_BLOCK, dim=-1)
    return (columns[:, :, None].expand(-1, -1, 4 * _BLOCK, -1).roll((-_BLOCK // 2,) * 2, (-2, -1)).contiguous(),)
