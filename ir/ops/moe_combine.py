"""``regraft::moe_combine``: what the experts of other ranks made of this rank's tokens comes back and is summed; the
last node of a sharded block of experts (see ``moe_dispatch.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.nodes import arguments
from regraft.ir.ops.registry import Cost, elements, register, tensor_bytes
from regraft.ir.transport import ALONE, exchange, group_of


def reference(
    results: Tensor,
    token: Tensor,
    counts: Tensor,
    tokens: int,
    *,
    ranks: int,
    dtype: torch.dtype,
    rank: int = 0,
    group: str = ALONE,
) -> Tensor:
    """``[tokens, hidden]``: row ``t`` is the sum over the rows that were sent for token ``t``, kept in fp32 at least.

    ``results [received, hidden]`` are the experts' outputs for the rows that ``regraft::moe_dispatch`` gave, ``token``
    and ``counts`` are its own. A token that no expert served is zero. Raises ``GroupError``.
    """
    if group != ALONE:
        sent, received = counts.tolist()
        results = exchange(results, received, sent, group_of(group, ranks, rank))
    wide = torch.promote_types(results.dtype, torch.float32)
    total = results.new_zeros((tokens, results.shape[1]), dtype=wide)
    return total.index_add_(0, token, results.to(wide)).to(dtype)


def _fake(results: Tensor, tokens: int, dtype: torch.dtype, **_: Any) -> Tensor:
    return results.new_empty((tokens, results.shape[1]), dtype=dtype)


def cost(node: fx.Node) -> Cost:
    """Every row that comes back is added once."""
    results = arguments(node)["results"].meta["val"]
    return Cost(elements(results), 2.0 * tensor_bytes(results) + tensor_bytes(node.meta["val"]))


moe_combine = register(
    "moe_combine",
    "(Tensor results, Tensor token, Tensor counts, SymInt tokens, *, int ranks, ScalarType dtype, int rank=0, "
    "str group='') -> Tensor",
    reference,
    _fake,
    cost,
)
