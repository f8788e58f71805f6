"""Launchers of ``tokens.cpp``: plans, merges, rows put back and recurrences, of fp32, last strides one."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from regraft.codegen.cpu.native.call import LONG, POINTER, NativeCall, rows_of


class _Plan(ctypes.Structure):
    """``Plan`` in ``tokens.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("metric", "keep", "kept", "sources", "slots", "workspace")),
        *(
            (name, LONG)
            for name in ("batch", "heads", "tokens", "width", "remove", "prefix", "suffix", "causal", "diverse")
        ),
        ("metric_strides", LONG * 3),
        ("keep_strides", LONG * 2),
    )


class _Merge(ctypes.Structure):
    """``Merge`` in ``tokens.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "sizes", "kept", "sources", "slots", "out", "total")),
        *((name, LONG) for name in ("batch", "tokens", "left", "width")),
        ("x_strides", LONG * 2),
        ("size_strides", LONG * 2),
    )


class _Unmerge(ctypes.Structure):
    """``Unmerge`` in ``tokens.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "slots", "out")),
        *((name, LONG) for name in ("batch", "tokens", "width")),
        ("x_strides", LONG * 2),
    )


class _Scan(ctypes.Structure):
    """``Scan`` in ``tokens.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("decay", "added", "start", "out")),
        *((name, LONG) for name in ("batch", "steps", "width")),
        ("decay_strides", LONG * 3),
        ("added_strides", LONG * 2),
        ("start_stride", LONG),
    )


class _Log(ctypes.Structure):
    """``Log`` in ``tokens.cpp``, field by field."""

    _fields_ = (("x", POINTER), ("out", POINTER), ("count", LONG))


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions take and return."""
    library.regraft_plan_workspace.argtypes = [LONG] * 6
    library.regraft_plan_workspace.restype = LONG
    for name in (
        "regraft_plan_merge",
        "regraft_merge_tokens",
        "regraft_unmerge_tokens",
        "regraft_log",
        "regraft_linear_scan",
    ):
        getattr(library, name).restype = None


def plan(
    library: ctypes.CDLL,
    metric: Tensor,
    keep: Tensor | None,
    remove: int,
    prefix: int,
    suffix: int,
    causal: bool,
    diverse: bool = False,
) -> NativeCall:
    """``regraft::plan_merge`` by the matching "bipartite", or "diverse". ``metric`` is ``[batch, heads, tokens,
    width]``, whose mean over heads is compared; ``keep`` ``[batch, tokens]`` is bool."""
    batch, heads, tokens, width = metric.shape
    kept, sources, slots = (
        torch.empty((batch, size), dtype=torch.int64, device=metric.device)
        for size in (tokens - remove, remove, tokens)
    )
    metric = rows_of(metric)
    floats = library.regraft_plan_workspace(batch, tokens, width, prefix, suffix, int(diverse))
    workspace = torch.empty(floats, dtype=torch.float32, device=metric.device)
    values = (
        batch, heads, tokens, width, remove, prefix, suffix, int(causal), int(diverse),
        metric.stride()[:3], (0, 0) if keep is None else keep.stride(),
    )  # fmt: skip
    made = (kept, sources, slots, workspace)
    return NativeCall("regraft_plan_merge", _Plan, (metric, keep, *made), values, (kept, sources, slots), made)


def merge(
    library: ctypes.CDLL, x: Tensor, sizes: Tensor | None, kept: Tensor, sources: Tensor, slots: Tensor
) -> NativeCall:
    """``regraft::merge_tokens`` of ``x`` ``[batch, tokens, width]``."""
    batch, tokens, width = x.shape
    left = kept.shape[1]
    x = rows_of(x)
    out, total = x.new_empty((batch, left, width)), x.new_empty((batch, left))
    indices = tuple(index.contiguous() for index in (kept, sources, slots))
    values = batch, tokens, left, width, x.stride()[:2], (0, 0) if sizes is None else sizes.stride()
    tensors = (x, sizes, *indices, out, total)
    return NativeCall("regraft_merge_tokens", _Merge, tensors, values, (out, total), (out, total))


def log(library: ctypes.CDLL, x: Tensor) -> NativeCall:
    """The natural logarithm of a few numbers."""
    x = x.contiguous()
    out = torch.empty_like(x)
    return NativeCall("regraft_log", _Log, (x, out), (x.numel(),), out, (out,))


def unmerge(library: ctypes.CDLL, x: Tensor, slots: Tensor) -> NativeCall:
    """``regraft::unmerge_tokens`` of ``x`` ``[batch, left, width]``."""
    batch, tokens = slots.shape
    x = rows_of(x)
    out = x.new_empty((batch, tokens, x.shape[2]))
    values = batch, tokens, x.shape[2], x.stride()[:2]
    return NativeCall("regraft_unmerge_tokens", _Unmerge, (x, slots.contiguous(), out), values, out, (out,))


def scan(library: ctypes.CDLL, decay: Tensor, added: Tensor, start: Tensor) -> NativeCall:
    """``regraft::linear_scan``."""
    batch, steps, width = added.shape
    decay, added, start = rows_of(decay), rows_of(added), rows_of(start)
    out = start.new_empty((batch, steps + 1, width))
    each = 0 if decay.shape[2] == 1 else 1
    values = batch, steps, width, (*decay.stride()[:2], each), added.stride()[:2], start.stride(0)
    return NativeCall("regraft_linear_scan", _Scan, (decay, added, start, out), values, out, (out,))
