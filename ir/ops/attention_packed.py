"""``regraft::attention_packed``: attention inside each sample of a packed batch.

Samples lie one after the other; ``offsets`` says where each begins. What a sample computes is what
``regraft::attention`` computes on it with its padding hidden: the mask is said of the places that tokens had in the
padded batch, and tokens that are packed though they are padding stay hidden as keys.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from regraft.ir.mask import parse, to_dense
from regraft.ir.nodes import arguments, concrete
from regraft.ir.ops.attention import reference as attention_reference
from regraft.ir.ops.registry import Cost, register, traffic


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    offsets: Tensor,
    present: Tensor,
    length: int,
    scale: float,
    mask: str,
    mask_fill: float | None,
    empty_rows: str,
    softcap: float,
) -> Tensor:
    """The definition.

    ``query`` ``[1, heads, tokens, head_dim]``, ``key`` and ``value`` ``[1, kv_heads, tokens, …]``; ``index``,
    ``offsets`` and ``present`` as of ``regraft::pack_tokens``; ``length`` is that of the padded batch, and ``mask`` a
    predicate over its places without tensors. A sample that is all there, with no mask besides, runs PyTorch's SDPA;
    others run the definition of ``regraft::attention``.
    """
    out = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3])).transpose(1, 2)
    allowed = None if mask == "all" else to_dense(parse(mask), [], 1, 1, length, length, query.device)[0, 0]
    hidden = (~present.reshape(-1)).nonzero()[:, 0].tolist()
    for start, stop in pairwise(offsets.tolist()):
        q, k, v = (tensor[:, :, start:stop] for tensor in (query, key, value))
        if allowed is None and softcap == 0 and not any(start <= place < stop for place in hidden):
            grouped = query.shape[1] != key.shape[1]
            out[:, :, start:stop] = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
            continue
        seen = present[0, None, start:stop].expand(stop - start, -1)
        if allowed is not None:
            places = index[0, start:stop] % length
            seen = seen & allowed[places][:, places]
        options = None, None, None, scale, "dense(0)", mask_fill, empty_rows, softcap
        out[:, :, start:stop] = attention_reference(q, k, v, [seen], *options)
    return out


def _fake(query: Tensor, value: Tensor, **_: Any) -> Tensor:
    sizes = 1, query.shape[2], query.shape[1], value.shape[3]
    return torch.empty(sizes, dtype=query.dtype, device=query.device).transpose(1, 2)


def cost(node: fx.Node) -> Cost:
    """Two matrix products for each sample, all of the same length."""
    given = arguments(node)
    heads, tokens, head_dim = (concrete(size) for size in given["query"].meta["val"].shape[1:])
    samples = max(1, concrete(given["offsets"].meta["val"].shape[0]) - 1)
    width = concrete(given["value"].meta["val"].shape[3])
    return Cost(2.0 * heads * tokens * tokens / samples * (head_dim + width), traffic(node))


attention_packed = register(
    "attention_packed",
    "(Tensor query, Tensor key, Tensor value, Tensor index, Tensor offsets, Tensor present, *, int length, "
    "float scale, str mask='all', float? mask_fill=None, str empty_rows='nan', float softcap=0.0) -> Tensor",
    reference,
    _fake,
    cost,
)
