"""The part "attention" of ``make gpu``: attention of many queries beside PyTorch's kernels and FlexAttention.

Rates are floating-point operations of the pairs that a mask shows, ``2 (head_dim + value_dim)`` a pair and head. A
mask's row is also told on its live tiles: those of the kernel's size that hold a visible pair.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_operands import Sizes, attention_operands
from bench.gpu_rows import Outcome, Part, Row, Setting, device_times
from regraft.codegen.triton.attention_prefill import emit_prefill
from regraft.codegen.triton.attention_samples import MASKS
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.load import load_kernel
from regraft.ir.mask import parse, to_dense

_HIDDEN, _TOKENS = 2048, 16384
#: TFLOP/s that an H200 should reach without a mask, by head_dim.
_TARGETS = {64: 400.0, 128: 475.0}
_LIVE, _FLEX = 0.85, 1.1
_LENGTHS = tuple(range(1000, 1010))


def rows(setting: Setting) -> dict[str, Row]:
    """Without a mask for two head dims, each mask, and ten lengths."""
    found: dict[str, Row] = {f"dense {dim}": partial(_dense, dim) for dim in _TARGETS}
    found["causal 128"] = partial(_masked, "band(None,0)")
    found |= {f"{name} 128": partial(_masked, mask) for name, mask in MASKS.items() if name != "dense"}
    return found | {"ten lengths": _lengths}


def _sizes(dim: int, setting: Setting) -> Sizes:
    length = setting.pick(8192, 64)
    return Sizes(setting.pick(_TOKENS // length, 1), setting.pick(_HIDDEN // dim, 12), 1, length, length)


def _dense(dim: int, setting: Setting) -> Outcome:
    spec, sizes = AttentionSpec(torch.bfloat16, dim, dim, empty_rows="zero"), _sizes(dim, setting)
    calls, pairs = _calls(spec, sizes, setting)
    times = device_times(calls, setting)
    rates = {name: 4e-9 * dim * pairs / milliseconds for name, milliseconds in times.items()}
    passed = rates["regraft"] >= _TARGETS[dim] if "H200" in setting.gpu_name else None
    figures: dict[str, Any] = {f"{name} TFLOP/s": rate for name, rate in rates.items()}
    best = max((rate for name, rate in rates.items() if name != "regraft"), default=float("nan"))
    met = {} if passed is None else {f"prefill {dim}": passed}
    figures["regraft over best peer"] = rates["regraft"] / best
    return Outcome(figures, passed, f"{_TARGETS[dim]:g} on an H200", met)


def _masked(mask: str, setting: Setting) -> Outcome:
    """One mask beside the same kernel without one, FlexAttention with the building of its mask, and a dense mask."""
    spec, sizes = AttentionSpec(torch.bfloat16, 128, 128, mask), _sizes(128, setting)
    given = attention_operands(spec, sizes, setting.device)
    seen = _seen(spec, sizes, given)
    calls, pairs = _calls(spec, sizes, setting, given, seen)
    whole = AttentionSpec(torch.bfloat16, 128, 128, empty_rows="zero")
    times = device_times(calls | {"without a mask": _kernel_call(whole, given)}, setting)
    tiles = load_kernel(emit_prefill(spec)).tiles(torch.device(setting.device))
    live = _live_share(seen, *tiles[:2])
    share = float(seen.float().mean())
    figures: dict[str, Any] = {f"{name} ms": milliseconds for name, milliseconds in times.items()}
    figures["visible TFLOP/s"] = 4e-9 * 128 * pairs * share / times["regraft"]
    figures["rate on live tiles over rate without a mask"] = live * times["without a mask"] / times["regraft"]
    flex = times.get("flex with its mask")
    if flex is not None:
        figures["flex with its mask over regraft"] = flex / times["regraft"]
    met = {"masked": figures["rate on live tiles over rate without a mask"] >= _LIVE}
    met |= {} if flex is None else {"flex": flex / times["regraft"] >= _FLEX}
    target = f"{_LIVE:.0%} on live tiles, {_FLEX}x flex"
    return Outcome(figures, all(met.values()), target, met) if setting.on_gpu else Outcome(figures, None, target)


def _calls(
    spec: AttentionSpec, sizes: Sizes, setting: Setting, given: dict[str, Any] | None = None, seen: Tensor | None = None
) -> tuple[dict[str, Callable[[], Any]], int]:
    """The kernel and its peers on the same operands, and how many pairs of query and key there are."""
    given = given or attention_operands(spec, sizes, setting.device)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    calls = {"regraft": _kernel_call(spec, given)}
    if seen is not None:
        calls["sdpa with a dense mask"] = lambda: F.scaled_dot_product_attention(query, key, value, seen)
    if seen is None or spec.mask == "band(None,0)":
        for name in ("flash", "cudnn"):
            calls[f"sdpa {name}"] = partial(_sdpa, name, query, key, value, seen is not None)
    if setting.on_gpu:
        calls |= _flex_calls(spec, sizes, given, seen)
    return calls, sizes.batch * sizes.kv_heads * sizes.group * sizes.queries * sizes.keys


def _kernel_call(spec: AttentionSpec, given: dict[str, Any]) -> Callable[[], Any]:
    kernel = emit_prefill(spec)
    operator, operands = load_kernel(kernel).operator, [given[name] for name in kernel.operands]
    return lambda: operator(*operands)


def _sdpa(backend: str, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]
    with sdpa_kernel(chosen) if query.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def _flex_calls(
    spec: AttentionSpec, sizes: Sizes, given: dict[str, Any], seen: Tensor | None
) -> dict[str, Callable[[], Any]]:
    """FlexAttention compiled, alone and with the building of its mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # beyond a number of masks it would run eagerly, without a word
    attend = torch.compile(flex_attention, dynamic=False)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    if seen is None:
        return {"flex": lambda: attend(query, key, value)}
    rule, heads = _flex_rules(given)[spec.mask], seen.shape[1] if "heads(" in spec.mask else None
    build = torch.compile(create_block_mask, dynamic=False)

    def made() -> Any:
        return build(rule, sizes.batch, heads, sizes.queries, sizes.keys, device=query.device)

    once = cache(made)
    return {
        "flex": lambda: attend(query, key, value, block_mask=once()),
        "flex with its mask": lambda: attend(query, key, value, block_mask=made()),
    }


def _flex_rules(given: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Masks as FlexAttention takes them, by predicate; tensors are those that the kernel reads."""
    left, right = given.get("mask_0"), given.get("mask_1")

    def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert left is not None and right is not None
        return (left[b, q] == right[b, k]) & (k <= q)

    def padding(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert left is not None
        return left[b, k]

    def lengths(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert left is not None
        return (k < left[b]) & (k <= q)

    return {
        "band(None,0)": lambda b, h, q, k: k <= q,
        MASKS["window"]: lambda b, h, q, k: (k <= q) & (q - k <= 511),
        MASKS["sink+window"]: lambda b, h, q, k: (k <= q) & ((k < 4) | (q - k <= 511)),
        MASKS["chunks"]: lambda b, h, q, k: q // 256 == k // 256,
        MASKS["prefix"]: lambda b, h, q, k: (k < 64) | (k <= q),
        MASKS["half of the heads local"]: lambda b, h, q, k: (k <= q) & ((h < 8) | (q - k <= 511)),
        MASKS["documents"]: documents,
        MASKS["padding"]: padding,
        MASKS["lengths"]: lengths,
    }


def _seen(spec: AttentionSpec, sizes: Sizes, given: dict[str, Any]) -> Tensor:
    """The dense mask, of one head where all heads have the same."""
    heads = sizes.kv_heads * sizes.group if "heads(" in spec.mask else 1
    numbered = [given.get(f"mask_{number}", torch.empty(0)) for number in range(2)]
    lengths = sizes.queries, sizes.keys
    return to_dense(parse(spec.mask), numbered, sizes.batch, heads, *lengths, given["query"].device)


def _live_share(seen: Tensor, rows_: int, columns: int) -> float:
    """The share of tiles that hold a visible pair."""
    padding = (0, -seen.shape[3] % columns, 0, -seen.shape[2] % rows_)
    whole = F.pad(seen, padding)
    cut = whole.unflatten(3, (-1, columns)).unflatten(2, (-1, rows_))
    return float(cut.any(-1).any(3).float().mean())


def _lengths(setting: Setting) -> Outcome:
    """Ten lengths in a row: how many variants of the kernel were built for them, and how long the first call took."""
    spec = AttentionSpec(torch.bfloat16, 64, 64, "band(-100,0)", empty_rows="zero")
    kernel = emit_prefill(spec)
    module = load_kernel(kernel)
    function = getattr(module, kernel.name)
    counts, seconds = [], []
    for length in setting.pick(_LENGTHS, (9, 10, 12)):
        given = attention_operands(spec, Sizes(1, 4, 1, length, length), setting.device)
        started = time.perf_counter()
        module.operator(*(given[name] for name in kernel.operands))
        if setting.on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        counts.append(_variants(function))
    rebuilt = counts[-1] - counts[0]
    figures = {
        "variants built after the first call": rebuilt,
        "first call s": seconds[0],
        "longest other call s": max(seconds[1:]),
    }
    met = {"lengths": rebuilt == 0} if setting.on_gpu else {}
    return Outcome(figures, rebuilt == 0, "no variant built after the first", met)


def _variants(function: Any) -> int:
    """How many binaries Triton holds of a kernel."""
    return sum(len(held[0]) for held in getattr(function, "device_caches", {}).values())


ATTENTION = Part("attention", 95.0, rows)
