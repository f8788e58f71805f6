"""Families of encoders: reduced, and right by an oracle that needs no trained weights, or refused with a reason.

"equal tokens": images whose patches come in equal pairs, positions set to zero: whatever merges, the outputs stay.
"padding": a method that drops tokens begins with padding, which nothing reads: the class token's output stays.
Both are run in fp64, beside a reduction by nothing, which must leave the program as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.tokens_detectors import blocks, forget_places, settings
from bench.tokens_quality import recognised
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.passes.base import Pass
from regraft.passes.tokens.bracket import BracketAttention
from regraft.passes.tokens.reduce import ReduceTokens

_LARGEST_ERROR = 1e-6
_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64, "image_size": 32, "patch_size": 8, "pad_token_id": 0, "mlp_ratio": 2,
}  # fmt: skip
_OF_THEIR_OWN = ("swin", "segformer")  # whose settings are lists, a number a stage
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_SEGFORMER = {
    "depths": [1, 1, 1, 2], "sr_ratios": [8, 4, 2, 1], "hidden_sizes": [8, 16, 24, 32], "strides": [2, 2, 1, 1],
    "num_attention_heads": [1, 2, 2, 2], "mlp_ratios": [2, 2, 2, 2], "decoder_hidden_size": 32,
}  # fmt: skip
_MODERN = {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
_HEAD = {
    "num_hidden_layers": 4,
    "out_indices": [1, 2, 3, 4],
    "auxiliary_channels": 16,
    "pool_scales": [1, 2],
    "semantic_loss_ignore_index": 255,
}


class Output(nn.Module):
    """A Hugging Face model whose output is one named tensor, or that of its class token."""

    def __init__(self, model: nn.Module, name: str, first: bool = False) -> None:
        super().__init__()
        self.model, self.name, self.first = model, name, first

    def forward(self, *inputs: Tensor) -> Tensor:
        """The tensor."""
        names = ("pixel_values",) if inputs[0].is_floating_point() else ("input_ids", "attention_mask")
        found: Tensor = getattr(self.model(**dict(zip(names, inputs, strict=True))), self.name)
        return found[:, 0] if self.first else found


@dataclass(frozen=True)
class Row:
    """A model with its inputs, the pass, and what is expected: an oracle, or a part of the reason of a refusal."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    reduce: Pass
    oracle: str = "equal tokens"
    refused: str = ""


def tiny(head: str, kind: str, output: str = "last_hidden_state", first: bool = False, **options: Any) -> nn.Module:
    """A model of a family with random weights in fp64, places of tokens aside."""
    import transformers

    detector = kind.endswith("detr")
    named = settings(kind) if detector else {} if kind in _OF_THEIR_OWN else _SIZES
    config = transformers.AutoConfig.for_model(kind, **{**named, **options})
    torch.manual_seed(0)
    how = "eager" if detector else "sdpa"
    model = getattr(transformers, head)._from_config(config, attn_implementation=how).eval().double()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype)
        if "position_embedding" in name or "pos_embed" in name:
            parameter.data.zero_()
        if "patch_embeddings" in name and kind == "segformer":
            parameter.data.zero_()  # overlapping patches are never alike, but for those that see nothing
        if "dwconv" in name:
            parameter.data *= 50  # so that tokens at the edges are not nearly alike those inside
        if "relative_position_bias_table" in name:
            parameter.data = torch.randn_like(parameter[:1]).expand_as(parameter).clone()  # the same for all places
    if detector:
        forget_places(model)
    for module in model.modules():
        if "RopePositionEmbedding" in type(module).__name__:
            module.register_forward_hook(lambda _module, _inputs, made: tuple(map(in_pairs, made)))
    return Output(model, output, first)


def in_pairs(table: Tensor) -> Tensor:
    """A table ``[tokens, width]`` of which every second row is as the one before."""
    return table[::2].repeat_interleave(2, dim=0)


def pairs() -> tuple[Tensor, ...]:
    """Images of two kinds of patches, two of a kind beside each other."""
    first, second = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (torch.cat((first, first, second, second), dim=-1).repeat(1, 1, 4, 1),)


def twins() -> tuple[Tensor, ...]:
    """Images of eight kinds of patches, two of a kind beside each other: no token is like another but its twin."""
    kinds = torch.randn(2, 3, 4, 8, 2, 1, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (kinds.expand(-1, -1, -1, -1, -1, 2, -1).reshape(2, 3, 32, 32),)


def padded() -> tuple[Tensor, ...]:
    """Texts of 16 tokens, of which at least 6 are padding."""
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(16) < torch.tensor([[10], [7]])).long()


class Attention(nn.Module):
    """Multi-head self-attention over ``[batch, tokens, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projections, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        parts = self.projections(x).reshape(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
        found: Tensor = self.out(
            F.scaled_dot_product_attention(parts[0], parts[1], parts[2]).transpose(1, 2).flatten(2)
        )
        return found


class UNetBlock(nn.Module):
    """A convolution, a transformer block over the pixels, a convolution, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 8, 8), nn.Conv2d(32, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.attention, self.up, self.down = Attention(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, image: Tensor) -> Tensor:
        """``[batch, 8, 4, 4]``."""
        grid = self.first(image)
        x = grid.flatten(2).transpose(1, 2)
        x = x + self.attention(self.norms[0](x))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        found: Tensor = self.last(grid + x.transpose(1, 2).reshape(grid.shape))
        return found


class DiTBlock(nn.Module):
    """A diffusion transformer's block: norms and residuals are shifted, scaled and gated by a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.condition = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 6 * 32)
        self.norm = nn.LayerNorm(32, elementwise_affine=False)
        self.attention, self.up, self.down = Attention(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, image: Tensor) -> Tensor:
        """``[batch, 16, 32]``."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        shift, scale, gate, shift2, scale2, gate2 = self.condition(x.mean(1, keepdim=True)).chunk(6, -1)
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        found: Tensor = x + gate2 * self.down(F.gelu(self.up(self.norm(x) * (1 + scale2) + shift2)))
        return found


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A block in fp64 with weights that are always the same."""
    torch.manual_seed(0)
    return make().double().eval()


_MERGE, _SMALL = ReduceTokens((4, 2, 1), "tome-stream"), ReduceTokens(4, "tome-stream")
_TWO = ReduceTokens((4, 2, 0, 0), "tome-stream")  # behind the encoder's attentions; those of object queries stay
_DROP, _WINDOWS = ReduceTokens(2, "prune-received"), "windows or groups of the samples"

ROWS: tuple[Row, ...] = (
    Row("vit", lambda: tiny("ViTModel", "vit"), pairs, _MERGE),
    Row("dinov2", lambda: tiny("Dinov2Model", "dinov2"), pairs, _MERGE),
    Row("siglip", lambda: tiny("SiglipVisionModel", "siglip_vision_model", "pooler_output"), pairs, _MERGE),
    Row("dinov2 with registers", lambda: tiny("Dinov2WithRegistersModel", "dinov2_with_registers"), pairs, _MERGE),
    Row("dinov3", lambda: tiny("DINOv3ViTModel", "dinov3_vit"), twins, _MERGE),
    Row("deit", lambda: tiny("DeiTModel", "deit"), pairs, _MERGE),
    Row("beit", lambda: tiny("BeitModel", "beit", use_relative_position_bias=True), pairs, _MERGE),
    Row("clip vision", lambda: tiny("CLIPVisionModel", "clip_vision_model"), pairs, _MERGE),
    Row("bert", lambda: tiny("BertModel", "bert", first=True), padded, _DROP, "padding"),
    Row("roberta", lambda: tiny("RobertaModel", "roberta", first=True), padded, _DROP, "padding"),
    Row("modernbert", lambda: tiny("ModernBertModel", "modernbert", first=True, **_MODERN), padded, _DROP, "padding"),
    Row("swin", lambda: tiny("SwinModel", "swin", **_SWIN), pairs, _SMALL, refused=_WINDOWS),
    Row("swin, attention alone", lambda: tiny("SwinModel", "swin", **_SWIN), pairs, BracketAttention(4), refused=" "),
    Row("segmentation: beit", lambda: tiny("BeitForSemanticSegmentation", "beit", "logits", **_HEAD), pairs,
        ReduceTokens(2, "tome-stream")),
    Row("segmentation: segformer, attention alone", lambda: tiny("SegformerModel", "segformer", **_SEGFORMER), pairs,
        BracketAttention(4)),
    Row("detection: yolos", lambda: tiny("YolosForObjectDetection", "yolos", "pred_boxes", image_size=[32, 32],
                                         num_detection_tokens=4), pairs, _MERGE),
    Row("detection: detr", lambda: tiny("DetrForObjectDetection", "detr", "pred_boxes"), blocks, _TWO),
    Row("detection: conditional detr", lambda: tiny("ConditionalDetrForObjectDetection", "conditional_detr",
                                                    "pred_boxes"), blocks, _TWO),
    Row("detection: rt-detr", lambda: tiny("RTDetrForObjectDetection", "rt_detr", "enc_outputs_class"), blocks,
        ReduceTokens(4, "tome-stream")),
    Row("detection: detr, its queries", lambda: tiny("DetrForObjectDetection", "detr", "pred_boxes"), blocks,
        ReduceTokens((0, 0, 2, 2), "tome-stream"), refused="the tokens come from weights"),
    Row("u-net block", lambda: seeded(UNetBlock), pairs, _SMALL),
    Row("u-net block, attention alone", lambda: seeded(UNetBlock), pairs, BracketAttention(8)),
    Row("dit block", lambda: seeded(DiTBlock), pairs, _SMALL),
    Row("dit block, attention alone", lambda: seeded(DiTBlock), pairs, BracketAttention(8)),
)  # fmt: skip


def check(row: Row) -> dict[str, Any]:
    """What became of one row, and whether it is what was to be."""
    program = recognised(row.build(), row.inputs())
    before, code = _output(program), str(program.graph)
    nothing = ReduceTokens(0) if isinstance(row.reduce, ReduceTokens) else BracketAttention(0)
    nothing.run(program, Session(verify="off"))
    unchanged = str(program.graph) == code and torch.equal(_output(program), before)
    session = Session(verify="off")
    fired = row.reduce.run(program, session)
    after = _output(program)
    error = float((after - before).norm() / before.norm())
    reasons = list(dict.fromkeys(f"{item.reason} at {_short(item.user_line)}" for item in session.log.refusals))
    right = unchanged and error <= _LARGEST_ERROR
    if row.refused:
        right &= not fired and str(program.graph) == code and any(row.refused in reason for reason in reasons)
    else:
        right &= fired > 0
    went = [entry.new_nodes[0] for entry in session.log.applications]
    return {
        "family": row.name,
        "reduced": fired,
        "went": went,
        "refused": reasons,
        "oracle": "left as it was" if row.refused else row.oracle,
        "error": error,
        "right": right,
    }


def _short(line: str) -> str:
    """A user's line without the folders that differ from machine to machine."""
    return line.rpartition("site-packages/")[2]


def _output(program: Program) -> Tensor:
    found: Tensor = program.callable()(*program.example)[0]
    return found
