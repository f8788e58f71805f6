"""``regraft::moe_dispatch``: the tokens of this rank go to the ranks that hold their experts; the first of three nodes
that a sharded block of experts consists of (dispatch, ``regraft::moe`` over the rank's own experts,
``regraft::moe_combine``).

``copies [experts, most copies]`` says in which physical slots an expert lies (-1 pads at the end); slot ``s`` is the
local slot ``s % slots`` of rank ``s // slots``. A token that has a choice among an expert's copies takes the one that a
hash of its number and the expert's gives, where its number is its row in ``hidden``; with one copy in a row there is
no choice. An expert outside ``[0, experts)`` is left out, as ``regraft::moe`` does.

A row goes once to each distinct rank that serves its token, with all of the token's choices there (DeepEP's normal
mode), or, ``per_choice``, once for each choice (its low-latency mode).

Results: ``rows [received, hidden]`` in the order of their source ranks and then of their numbers there; ``slot
[received, top_k]`` the local slots that serve them (1 instead of top_k where ``per_choice``; below 0: not here);
``weight`` of the same shape, in fp32 at least, so that the experts' sum stays as wide as in one process; ``token
[sent]``, this rank's token of each row that it sent; ``counts [2, ranks]``, rows sent to and received from each.

In no group (``ALONE``) this process plays every rank: all rows stay, and ``slot`` holds physical slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.copies import Dispatched, tell
from regraft.ir.nodes import arguments
from regraft.ir.ops.registry import Cost, elements, register, tensor_bytes
from regraft.ir.transport import ALONE, exchange, exchange_counts, group_of

_LOW = 0xFFFFFFFF


def token_copy(token: Tensor, expert: Tensor, count: Tensor) -> Tensor:
    """Which of ``count`` copies of an expert a token uses: the hash that plans predict traffic with
    (``solvers.placement.split.token_copy``)."""
    mixed = (token % (1 << 30) * 2654435761 + expert * 2246822519) & _LOW
    mixed = ((mixed ^ (mixed >> 15)) * 73244475) & _LOW
    return (mixed >> 12) % count.clamp(min=1)


def served_slots(index: Tensor, copies: Tensor) -> Tensor:
    """The physical slot that serves each choice, ``[tokens, top_k]``; -1 where nobody does."""
    index = index.to(torch.int64)
    known = (index >= 0) & (index < copies.shape[0])
    expert = torch.where(known, index, 0)
    number = torch.arange(index.shape[0], device=index.device)[:, None]
    count = (copies >= 0).sum(1)
    slot = copies[expert, token_copy(number, expert, count[expert])]
    return torch.where(known, slot, -1)


def pack(slot: Tensor, slots: int, ranks: int, per_choice: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The rows to send, in the order of the ranks that they go to: token ``[sent]``, which of its choices go along
    ``[sent, top_k]`` (``[sent, 1]`` where ``per_choice``), and how many go to each rank ``[ranks]``."""
    tokens, top_k = slot.shape
    rank = torch.where(slot >= 0, slot.div(slots, rounding_mode="floor"), ranks)
    if per_choice:
        counts = torch.bincount(rank.reshape(-1), minlength=ranks + 1)[:ranks]
        order = torch.argsort(rank.reshape(-1), stable=True)[: int(counts.sum())]
        return order // max(top_k, 1), (order % max(top_k, 1))[:, None], counts
    reached = torch.zeros((tokens, ranks + 1), dtype=torch.bool, device=slot.device).scatter_(1, rank, True)[:, :ranks]
    pair = reached.t().reshape(-1).nonzero().reshape(-1)
    token, place = pair % max(tokens, 1), pair // max(tokens, 1)
    choice = torch.arange(top_k, device=slot.device).expand(len(token), -1)
    return token, torch.where(rank[token] == place[:, None], choice, -1), reached.sum(0)


def reference(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    copies: Tensor,
    *,
    ranks: int,
    slots: int,
    rank: int = 0,
    layer: int = 0,
    per_choice: bool = False,
    group: str = ALONE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The definition: ``hidden [tokens, hidden]``, ``index`` and ``weight [tokens, top_k]``. Every rank of the group
    must make the call, with any number of tokens. Raises ``GroupError`` where there is no such group."""
    peers = group_of(group, ranks, rank) if group != ALONE else None
    served = served_slots(index, copies)
    token, choice, sent = pack(served, slots, ranks, per_choice)
    here = choice >= 0
    kept = choice.clamp(min=0)
    slot = torch.where(here, served[token].gather(1, kept), -1)
    wide = torch.promote_types(weight.dtype, torch.float32)
    shares = torch.where(here, weight[token].gather(1, kept), 0).to(wide)
    rows = hidden[token]
    if peers is None:
        return rows, slot, shares, token, torch.stack([sent, sent])
    tell(Dispatched(layer, rank, tuple(sent.tolist()), index))
    received = exchange_counts(sent, peers)
    counts = torch.stack([sent, received])
    parts = rows, slot, shares
    blob = exchange(torch.cat([_bytes(part) for part in parts], 1), sent.tolist(), received.tolist(), peers)
    rows, slot, shares = _parts(blob, parts)
    return rows, torch.where(slot >= 0, slot - rank * slots, -1), shares, token, counts


def _bytes(rows: Tensor) -> Tensor:
    """``[rows, bytes]``: one message a copy, whatever types travel in it."""
    return _dense(rows).view(torch.uint8)


def _parts(blob: Tensor, like: tuple[Tensor, ...]) -> list[Tensor]:
    sizes = [part.shape[1] * part.element_size() for part in like]
    return [_dense(cut).view(part.dtype) for cut, part in zip(blob.split(sizes, 1), like, strict=True)]


def _dense(rows: Tensor) -> Tensor:
    """Rows in order, with the strides to show for it: of one row or none `contiguous` leaves them as they are."""
    return rows.clone(memory_format=torch.contiguous_format)


def _fake(
    hidden: Tensor, index: Tensor, weight: Tensor, ranks: int, per_choice: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    received, sent = context.new_dynamic_size(), context.new_dynamic_size()
    choices = 1 if per_choice else index.shape[1]
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (
        hidden.new_empty((received, hidden.shape[1])),
        index.new_empty((received, choices), dtype=torch.int64),
        weight.new_empty((received, choices), dtype=wide),
        index.new_empty((sent,), dtype=torch.int64),
        index.new_empty((2, ranks), dtype=torch.int64),
    )


def cost(node: fx.Node) -> Cost:
    """A row is read and written once for each rank that serves it, at most as many as it has choices; how many is only
    known from the data."""
    given = arguments(node)
    hidden, index = given["hidden"].meta["val"], given["index"].meta["val"]
    top_k = index.shape[1]
    times = top_k if given["per_choice"] else min(top_k, given["ranks"])
    return Cost(10.0 * elements(index), 2.0 * times * (tensor_bytes(hidden) + tensor_bytes(index)))


moe_dispatch = register(
    "moe_dispatch",
    "(Tensor hidden, Tensor index, Tensor weight, Tensor copies, *, int ranks, int slots, int rank=0, "
    "int layer=0, bool per_choice=False, str group='') -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference,
    _fake,
    cost,
)


def sharded_sites(graph: fx.Graph) -> list[dict[str, Any]]:
    """The arguments of every dispatch that speaks to other ranks, in order: a graph that has one cannot run alone."""
    calls = [arguments(node) for node in graph.nodes if node.target is moe_dispatch]
    return [given for given in calls if given["group"] != ALONE]
