"""``regraft::attention_mapped``: attention whose weights are a map of each score by itself, without a softmax.

``nu(sum_j w_ij) * sum_j w_ij v_j``, ``w = visible * phi(softcap(scale * q k^T) + bias + slopes * (key - query))``. A
key that the mask hides weighs nothing, whatever phi makes of low scores. Sigmoid attention (Ramapuram et al.,
arXiv:2409.04431), attention without a sink (Gu et al., arXiv:2410.10781) and linear kernels are of this form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.ir.ops.attention_scores import SCORE_OPERANDS, row_blocks, spread_heads, two_products, weighed_values
from regraft.ir.ops.registry import register

#: phi: a score's weight.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "elu1": lambda scores: F.elu(scores) + 1,
    "gelu": F.gelu,
    "identity": lambda scores: scores,
}
#: What divides a row, from its sum of weights Z: Z, nothing, Z + constant, max(|Z|, 1), constant.
NORMALISERS = ("sum", "none", "sum_eps", "sum_abs", "constant")


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_tensors: list[Tensor],
    bias: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    mask: str,
    softcap: float,
    weight: str,
    normaliser: str,
    constant: float,
) -> Tensor:
    """The definition; operands are shaped as those of ``regraft::attention``, computed in fp32 or wider. ``weight`` is
    a name of ``WEIGHTS``, ``normaliser`` one of ``NORMALISERS``; ``ValueError`` for any other. A few rows at a time."""
    if weight not in WEIGHTS or normaliser not in NORMALISERS:
        known = f"weights {', '.join(WEIGHTS)}; normalisers {', '.join(NORMALISERS)}"
        raise ValueError(f"weight {weight!r} with normaliser {normaliser!r} was given; known: {known}")
    values = spread_heads(query, value)
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    blocks = row_blocks(query, key, mask_tensors, bias, slopes, scale=scale, mask=mask, softcap=softcap)
    for rows, scores, seen in blocks:
        weights = WEIGHTS[weight](scores)
        if seen is not None:
            weights = weights.masked_fill(~seen, 0.0)
        out[:, :, rows] = (_normalised(weights @ values, weights, normaliser, constant)).to(query.dtype)
    return out


def _normalised(out: Tensor, weights: Tensor, normaliser: str, constant: float) -> Tensor:
    if normaliser == "none":
        return out
    if normaliser == "constant":
        return out / constant
    total = weights.sum(-1, keepdim=True)
    if normaliser == "sum_abs":
        return out / total.abs().clamp(min=1.0)
    return out / (total + constant if normaliser == "sum_eps" else total)


attention_mapped = register(
    "attention_mapped",
    f"(Tensor query, Tensor key, Tensor value, {SCORE_OPERANDS}, *, float scale, str weight, str mask='all', "
    "float softcap=0.0, str normaliser='none', float constant=0.0) -> Tensor",
    reference,
    weighed_values,
    two_products,
)
