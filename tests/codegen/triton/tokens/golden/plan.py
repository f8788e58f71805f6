"""Which tokens of each sample stay, and which go where: one program a sample.

Emitted by regraft: `regraft kernels` writes it again.

matching  bipartite
from      metric float16 of width 64, a mean over heads
node      plan_merge_1
source    model.py:21 in forward
rule      reduce tokens
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = tl.constexpr(64)
STAYS, FREE, PADDED, ODD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
#: Ranks of what goes for want of others: below every cosine and every negated score, and above minus infinity.
RANK_PADDED, RANK_ODD, RANK_ALONE = tl.constexpr(-1e30), tl.constexpr(-2e30), tl.constexpr(-4e30)

#: Tokens of two tiles, numbers of a token, warps, stages. A device that is not named takes the last before it.
CONFIGS = {
    "sm_80": (64, 64, 32, 8, 2),
    "sm_90": (64, 64, 32, 8, 2),
    "sm_100": (64, 64, 32, 8, 1),
    "gfx942": (64, 64, 32, 8, 2),
}


@triton.jit
def load_tile(metric_rows, places, inside, start, stride_token, stride_column, BLOCK_K: tl.constexpr):
    """Numbers ``start`` and behind of some tokens; zero behind the end."""
    lanes = start + tl.arange(0, BLOCK_K)
    address = metric_rows + places.to(tl.int64)[:, None] * stride_token + lanes[None, :] * stride_column
    return tl.load(address, mask=inside[:, None] & (lanes < WIDTH)[None, :], other=0.0)


@triton.jit
def mean_of_heads(
    keys,
    metric_rows,
    tokens,
    heads,
    stride_head,
    stride_token,
    stride_column,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The mean over the heads of every token's key, rounded as PyTorch rounds it."""
    for first in range(0, tokens, BLOCK_M):
        places = first + tl.arange(0, BLOCK_M)
        for start in range(0, WIDTH, BLOCK_K):
            total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for head in range(0, heads):
                key = keys + head * stride_head
                tile = load_tile(key, places, places < tokens, start, stride_token, stride_column, BLOCK_K)
                total += tile.to(tl.float32)
            lanes = start + tl.arange(0, BLOCK_K)
            inside = (places < tokens)[:, None] & (lanes < WIDTH)[None, :]
            tl.store(metric_rows + places[:, None] * WIDTH + lanes[None, :], total / heads, mask=inside)


@triton.jit
def largest_bits(metric_rows, places, inside, stride_token, stride_column, BLOCK_K: tl.constexpr):
    """The bits of the largest number of some tokens: magnitudes are ordered as these are, what is not finite last."""
    largest = tl.zeros(places.shape, tl.int32)
    for start in range(0, WIDTH, BLOCK_K):
        tile = load_tile(metric_rows, places, inside, start, stride_token, stride_column, BLOCK_K)
        bits = tile.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(bits, 1))
    return largest


@triton.jit
def lengths_of(metric_rows, places, inside, stride_token, stride_column, BLOCK_K: tl.constexpr):
    """The lengths of some tokens."""
    square = tl.zeros(places.shape, tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        tile = load_tile(metric_rows, places, inside, start, stride_token, stride_column, BLOCK_K)
        tile = tile.to(tl.float32)
        square += tl.sum(tile * tile, 1)
    return tl.sqrt_rn(square)


@triton.jit
def similar(metric_rows, length_rows, rows, columns, tokens, stride_token, stride_column, BLOCK_K: tl.constexpr):
    """The cosines of some tokens with others."""
    products = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        left = load_tile(metric_rows, rows, rows < tokens, start, stride_token, stride_column, BLOCK_K)
        right = load_tile(metric_rows, columns, columns < tokens, start, stride_token, stride_column, BLOCK_K)
        products = tl.dot(left, tl.trans(right), products)
    left_length = tl.load(length_rows + rows, mask=rows < tokens, other=0.0)
    right_length = tl.load(length_rows + columns, mask=columns < tokens, other=0.0)
    # Not each token by its own length: of numbers that point the same way the cosine is then exactly one.
    both = left_length[:, None] * right_length[None, :]
    return tl.where(both > 0.0, tl.div_rn(products, tl.where(both > 0.0, both, 1.0)), 0.0)


@triton.jit
def better(best, target, cosines, column, STEP: tl.constexpr):
    """How similar the most similar token so far is, and which one it is; of equals the first."""
    highest, place = tl.max(cosines, 1, return_indices=True, return_indices_tie_break_left=True)
    return tl.maximum(highest, best), tl.where(highest > best, column + STEP * place, target)


@triton.jit
def count_ahead(value_rows, places, value, tokens, BLOCK_N: tl.constexpr):
    """How many tokens stand before each: those of a higher value, and of equals those of a lower index."""
    ahead = tl.zeros(places.shape, tl.int32)
    for first in range(0, tokens, BLOCK_N):
        others = first + tl.arange(0, BLOCK_N)
        other = tl.load(value_rows + others, mask=others < tokens, other=float("-inf"))
        before = (other[None, :] > value[:, None]) | (
            (other[None, :] == value[:, None]) & (others[None, :] < places[:, None])
        )
        ahead += tl.sum((before & (others < tokens)[None, :]).to(tl.int32), 1)
    return ahead


@triton.jit(
    do_not_specialize=["tokens", "heads", "removed", "prefix", "suffix", "metric_stride_batch", "metric_stride_head"]
)
def token_plan_ce970bd9(
    metric,
    kept,
    sources,
    slots,
    numbers,
    marks,
    mean,
    tokens,
    heads,
    removed,
    prefix,
    suffix,
    metric_stride_batch,
    metric_stride_head,
    metric_stride_token,
    metric_stride_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The plan of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    metric_rows = mean + sample * tokens * WIDTH
    mean_of_heads(
        metric + sample * metric_stride_batch,
        metric_rows,
        tokens,
        heads,
        metric_stride_head,
        metric_stride_token,
        metric_stride_column,
        BLOCK_M,
        BLOCK_K,
    )
    tl.debug_barrier()
    length_rows = numbers + sample * 2 * tokens  # lengths
    rank_rows = length_rows + tokens
    state_rows = marks + sample * 4 * tokens
    gone_rows = state_rows + tokens
    target_rows = gone_rows + tokens
    chosen_rows = target_rows + tokens
    kept_rows = kept + sample * (tokens - removed)
    source_rows = sources + sample * removed
    slot_rows = slots + sample * tokens

    # Which tokens may go, and what each is compared by.
    for first in range(0, tokens, BLOCK_M):
        places = first + tl.arange(0, BLOCK_M)
        there = places < tokens
        largest = largest_bits(metric_rows, places, there, WIDTH, 1, BLOCK_K)
        finite = largest < 0x7F800000
        inner = (places >= prefix) & (places < tokens - suffix)
        state = tl.where(inner, tl.where(finite, FREE, ODD), STAYS)
        length = lengths_of(metric_rows, places, there, WIDTH, 1, BLOCK_K)
        tl.store(length_rows + places, length, mask=there)
        tl.store(state_rows + places, state, mask=there)
        tl.store(rank_rows + places, tl.full(places.shape, float("-inf"), tl.float32), mask=there)
        tl.store(target_rows + places, tl.full(places.shape, -1, tl.int32), mask=there)
        tl.store(chosen_rows + places, tl.zeros(places.shape, tl.int32), mask=there)
    tl.debug_barrier()

    # Every second token looks for the most similar of the others.
    for first in range(0, tokens, 2 * BLOCK_M):
        rows = prefix + first + 2 * tl.arange(0, BLOCK_M)
        row_free = tl.load(state_rows + rows, mask=rows < tokens, other=STAYS) == FREE
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        target = tl.full((BLOCK_M,), -1, tl.int32)
        for other in range(0, tokens, 2 * BLOCK_N):
            columns = prefix + 1 + other + 2 * tl.arange(0, BLOCK_N)
            column_free = tl.load(state_rows + columns, mask=columns < tokens, other=STAYS) == FREE
            cosines = similar(metric_rows, length_rows, rows, columns, tokens, WIDTH, 1, BLOCK_K)
            allowed = row_free[:, None] & column_free[None, :]
            best, target = better(best, target, tl.where(allowed, cosines, float("-inf")), prefix + 1 + other, 2)
        tl.store(rank_rows + rows, best, mask=row_free)
        tl.store(target_rows + rows, target, mask=row_free)
        tl.store(chosen_rows + target, tl.full((BLOCK_M,), 1, tl.int32), mask=target >= 0)
    tl.debug_barrier()

    # Whoever has no rank yet and is not protected goes for want of others.
    for first in range(0, tokens, BLOCK_M):
        places = first + tl.arange(0, BLOCK_M)
        rank = tl.load(rank_rows + places, mask=places < tokens, other=0.0)
        state = tl.load(state_rows + places, mask=places < tokens, other=STAYS)
        last = tl.where(state == PADDED, RANK_PADDED, tl.where(state == ODD, RANK_ODD, float("-inf")))
        alone = tl.load(chosen_rows + places, mask=places < tokens, other=1) == 0
        last = tl.where((state == FREE) & alone, RANK_ALONE, last)
        tl.store(rank_rows + places, last, mask=(places < tokens) & (rank == float("-inf")))
    tl.debug_barrier()

    # The highest ranks go; what stays and what goes is listed in ascending order.
    before = 0
    for first in range(0, tokens, BLOCK_M):
        places = first + tl.arange(0, BLOCK_M)
        there = places < tokens
        rank = tl.load(rank_rows + places, mask=there, other=float("-inf"))
        goes = there & (count_ahead(rank_rows, places, rank, tokens, BLOCK_N) < removed)
        ahead = before + tl.cumsum(goes.to(tl.int32), 0) - goes.to(tl.int32)
        tl.store(gone_rows + places, goes.to(tl.int32), mask=there)
        tl.store(source_rows + ahead, places, mask=goes)
        tl.store(kept_rows + places - ahead, places, mask=there & (goes == 0))
        tl.store(slot_rows + places, places - ahead, mask=there & (goes == 0))
        before += tl.sum(goes.to(tl.int32), 0)
    tl.debug_barrier()
    for first in range(0, tokens, BLOCK_M):
        places = first + tl.arange(0, BLOCK_M)
        goes = tl.load(gone_rows + places, mask=places < tokens, other=0) == 1
        into = tl.load(target_rows + places, mask=goes, other=-1)
        slot = tl.load(slot_rows + into, mask=goes & (into >= 0), other=-1)
        tl.store(slot_rows + places, slot, mask=goes)


def reference(metric: Tensor, remove: int, prefix: int, suffix: int) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: what runs without the kernel, and what tests compare with it."""
    metric = metric.mean(1)
    batch, tokens = metric.shape[:2]
    wide = metric.float()
    finite = wide.isfinite().all(-1)
    places = torch.arange(tokens, device=metric.device)
    inner = ((places >= prefix) & (places < tokens - suffix)).expand(batch, tokens)
    padded = torch.zeros_like(inner)
    free = inner & finite & ~padded
    wide = wide.masked_fill(~finite[..., None], 0.0)
    exponent = wide.abs().amax(-1, keepdim=True).frexp().exponent.clamp(-125, 125)
    wide = wide * torch.exp2(-exponent.float())
    length = wide.norm(dim=-1, keepdim=True)
    wide = wide / torch.where(length > 0, length, 1.0)
    cosines = wide @ wide.transpose(-1, -2)
    even = (places - prefix) % 2 == 0
    allowed = (free & even)[:, :, None] & (free & ~even)[:, None, :]
    rank, target = cosines.masked_fill(~allowed, -torch.inf).max(-1)
    target = target.masked_fill(rank == -torch.inf, -1)
    spare = inner & (rank == -torch.inf) & ~free
    rank = rank.masked_fill(spare & padded, RANK_PADDED.value).masked_fill(spare & ~padded, RANK_ODD.value)
    chosen = torch.zeros((batch, tokens + 1), dtype=torch.bool, device=metric.device)
    chosen = chosen.scatter_(1, target + 1, True)[:, 1:]
    rank = rank.masked_fill(inner & (rank == -torch.inf) & ~chosen, RANK_ALONE.value)
    order = rank.argsort(dim=-1, descending=True, stable=True)
    sources, kept = order[:, :remove].sort(-1).values, order[:, remove:].sort(-1).values
    slots = torch.empty_like(order)
    slots.scatter_(1, kept, torch.arange(tokens - remove, device=metric.device).expand(kept.shape))
    into = target.masked_fill(~free, -1).gather(1, sources)
    merged = torch.where(into < 0, -1, slots.gather(1, into.clamp(min=0)))
    return kept, sources, slots.scatter_(1, sources, merged)


def check(metric: Tensor, remove: int, prefix: int, suffix: int) -> tuple[int, int]:
    """The numbers of samples and tokens; raises ``ValueError`` for operands of other types or sizes."""
    if metric.dim() != 4 or metric.shape[-1] != WIDTH.value or metric.dtype != torch.float16:
        given = f"metric is {metric.dtype} {tuple(metric.shape)}"
        raise ValueError(f"{given}: expected torch.float16 [batch, heads, tokens, {WIDTH.value}]")
    batch, tokens = metric.shape[0], metric.shape[-2]
    most = tokens - prefix - suffix
    most = most // 2
    if not 0 <= remove <= most:
        raise ValueError(f"{remove} of {tokens} tokens were to be removed: at most {most} can")
    return batch, tokens


def tiles(device: torch.device) -> tuple[int, ...]:
    """The line of ``CONFIGS`` for a device."""
    if device.type != "cuda" or torch.version.hip:
        return CONFIGS["gfx942"]
    return CONFIGS[_arch(device)]


@functools.cache
def _arch(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(int(arch[3:]) for arch in CONFIGS if arch.startswith("sm_"))
    return f"sm_{max([arch for arch in known if arch <= 10 * major + minor], default=known[0])}"


def launch(
    metric: Tensor,
    remove: int,
    prefix: int,
    suffix: int,
    config: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel, by default with the device's tiles."""
    batch, tokens = check(metric, remove, prefix, suffix)
    kept, sources, slots = _fake(metric, remove, prefix, suffix)
    if batch == 0 or tokens == 0:
        return kept, sources, slots
    reach = max(
        metric.stride(-1) * WIDTH.value,
        metric.stride(-2),
        4 * tokens,
        metric.stride(1) * metric.shape[1],
        tokens * WIDTH.value,
    )
    if reach >= 2**31:  # farther than a kernel counts
        return reference(metric, remove, prefix, suffix)
    numbers = metric.new_empty((batch, 2, tokens), dtype=torch.float32)
    marks = metric.new_empty((batch, 4, tokens), dtype=torch.int32)
    mean = metric.new_empty((batch, tokens, WIDTH.value))
    block_m, block_n, block_k, warps, stages = config or tiles(metric.device)
    with torch.cuda.device_of(metric):
        token_plan_ce970bd9[(batch,)](
            metric,
            kept,
            sources,
            slots,
            numbers,
            marks,
            mean,
            tokens,
            metric.shape[1],
            remove,
            prefix,
            suffix,
            metric.stride(0),
            metric.stride(1),
            metric.stride(2),
            metric.stride(-1),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
        )
    return kept, sources, slots


@torch.library.custom_op("regraft_kernels::token_plan_ce970bd9", mutates_args=(), device_types="cpu")
def operator(metric: Tensor, remove: int, prefix: int, suffix: int) -> tuple[Tensor, Tensor, Tensor]:
    """The operator: its definition on the CPU, the kernel on a GPU."""
    check(metric, remove, prefix, suffix)
    return reference(metric, remove, prefix, suffix)


@operator.register_kernel("cuda")
def _on_device(metric: Tensor, remove: int, prefix: int, suffix: int) -> tuple[Tensor, Tensor, Tensor]:
    return launch(metric, remove, prefix, suffix)


@operator.register_fake
def _fake(metric: Tensor, remove: int, prefix: int, suffix: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = metric.shape[0], metric.shape[-2]
    counts = tokens - remove, remove, tokens
    kept, sources, slots = (torch.empty((batch, count), dtype=torch.long, device=metric.device) for count in counts)
    return kept, sources, slots
