"""``regraft::plan_merge``: which tokens of each sample stay and which go where, as indices of static shape.

The tokens that go, and whatever they merge into, are chosen by a matching (``ir/ops/matchings.py``) from a metric or
from scores. Tokens of the prefix and the suffix stay. Padded tokens (``keep`` false) and tokens whose metric or score
is not finite are neither merged nor merged into: a matching that merges drops them where a sample has too few others,
the padded ones first, and one that drops tokens begins with the padded ones. The plan of a sample depends on that
sample alone, and is the same on every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.nodes import arguments, concrete
from regraft.ir.ops.matchings import MATCHINGS, NEVER, ORDERED, PAIRED, SCORED, Candidates, compared
from regraft.ir.ops.registry import Cost, register, traffic

#: Ranks of what is dropped for want of others: below every cosine and every negated score, and above ``NEVER``.
_PADDED, _ODD = -1e30, -2e30


def reference(
    metric: Tensor,
    scores: Tensor | None,
    keep: Tensor | None,
    remove: int,
    matching: str,
    prefix: int,
    suffix: int,
    causal: bool,
    margin: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition.

    ``metric`` ``[batch, tokens, width]`` says what is alike; ``scores`` ``[batch, tokens]`` what is important; ``keep``
    ``[batch, tokens]`` is true for tokens that are no padding. Returns three int64 tensors: ``kept``
    ``[batch, tokens - remove]`` and ``sources`` ``[batch, remove]``, the indices of the tokens that stay and go, both
    ascending; ``slots`` ``[batch, tokens]``, where each token is found afterwards, -1 for one that was dropped. Raises
    ``ValueError`` for a matching that is not known, or more tokens to remove than it can.
    """
    tokens = metric.shape[1]
    _check(tokens, scores is not None, remove, matching, prefix, suffix, causal)
    wide = metric.float()
    finite = wide.isfinite().all(-1)
    padded = torch.zeros_like(finite) if keep is None else ~keep.bool()
    if scores is not None:
        scores = scores.float()
        finite = finite & scores.isfinite()
        scores = scores.nan_to_num(0.0, 0.0, 0.0)
    inner = torch.zeros_like(finite)
    inner[:, prefix : tokens - suffix] = True
    wide = _unit(wide.masked_fill(~finite[..., None], 0.0))
    padded = padded & inner
    free = inner & finite & ~padded
    rank, target = MATCHINGS[matching](Candidates(wide, scores, free, padded, remove, prefix, causal, margin))
    spare = inner & (rank == NEVER) & ~free
    rank = rank.masked_fill(spare & padded, _PADDED).masked_fill(spare & ~padded, _ODD)
    if matching in PAIRED:  # the last resort, for a sample most of whose tokens have no partner
        rank = rank.masked_fill(inner & (rank == NEVER) & ~_is_target(target), 2 * _ODD)
    return _indices(rank, target.masked_fill(~free, -1), remove)


def _unit(rows: Tensor) -> Tensor:
    """Finite rows of length one, or zero. Squares leave the range of fp32 long before numbers do: rows are multiplied
    by a power of two first, which brings the largest number near one and rounds nothing."""
    exponent = rows.abs().amax(-1, keepdim=True).frexp().exponent.clamp(-125, 125)
    rows = rows * torch.exp2(-exponent.to(rows.dtype))
    length = rows.norm(dim=-1, keepdim=True)
    return rows / torch.where(length > 0, length, 1.0)


def _is_target(target: Tensor) -> Tensor:
    """Whether some token merges into this one."""
    hit = torch.zeros((target.shape[0], target.shape[1] + 1), dtype=torch.bool, device=target.device)
    return hit.scatter_(1, target + 1, True)[:, 1:]


def _indices(rank: Tensor, target: Tensor, remove: int) -> tuple[Tensor, Tensor, Tensor]:
    order = rank.argsort(dim=-1, descending=True, stable=True)
    sources, kept = order[:, :remove].sort(-1).values, order[:, remove:].sort(-1).values
    slots = torch.empty_like(order)
    slots.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand(kept.shape))
    into = target.gather(1, sources)
    merged = torch.where(into < 0, -1, slots.gather(1, into.clamp(min=0)))
    return kept, sources, slots.scatter_(1, sources, merged)


def most_removable(tokens: int, matching: str, prefix: int, suffix: int) -> int:
    """How many of ``tokens`` a matching can remove. One between the protected ends stays: whatever reads those, an
    attention, a mean or the next reduction, finds something."""
    inner = max(0, tokens - prefix - suffix)
    return inner // 2 if matching in PAIRED else max(0, inner - 1)


def _check(tokens: int, scored: bool, remove: int, matching: str, prefix: int, suffix: int, causal: bool) -> None:
    if matching not in MATCHINGS:
        raise ValueError(f"unknown matching {matching!r}; known: {', '.join(MATCHINGS)}")
    if matching in SCORED and not scored:
        raise ValueError(f"the matching {matching!r} needs scores, and none were given")
    if causal and matching not in ORDERED:
        raise ValueError(f"the matching {matching!r} cannot keep a causal order; those that can: {', '.join(ORDERED)}")
    most = most_removable(tokens, matching, prefix, suffix)
    if not 0 <= remove <= most:
        raise ValueError(
            f"{remove} of {tokens} tokens were to be removed; the matching {matching!r} can remove 0 to {most} beside "
            f"{prefix} protected tokens in front and {suffix} at the end"
        )


def _fake(
    metric: Tensor, scores: Tensor | None, remove: int, matching: str, prefix: int, suffix: int, causal: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = metric.shape[:2]
    _check(concrete(tokens), scores is not None, remove, matching, prefix, suffix, causal)

    def indices(size: int) -> Tensor:
        return torch.empty((batch, size), dtype=torch.long, device=metric.device)

    return indices(tokens - remove), indices(remove), indices(tokens)


def cost(node: fx.Node) -> Cost:
    """The products of tokens with tokens that the matching compares."""
    given = arguments(node)
    batch, tokens, width = (concrete(size) for size in given["metric"].meta["val"].shape)
    return Cost(2.0 * batch * compared(given["matching"], tokens) * width, traffic(node))


plan_merge = register(
    "plan_merge",
    "(Tensor metric, Tensor? scores=None, Tensor? keep=None, *, int remove, str matching='bipartite', "
    "int prefix=0, int suffix=0, bool causal=False, float margin=0.0) -> (Tensor, Tensor, Tensor)",
    reference,
    _fake,
    cost,
)
