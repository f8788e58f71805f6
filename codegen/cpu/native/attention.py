"""Launcher of ``attention.cpp``: tensors in, the struct that the kernel reads, a tensor out."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from regraft.codegen.cpu.native.call import FLOAT, INT, LONG, POINTER, NativeCall
from regraft.ir.mask.spans import MOST_SPANS

_POINTERS = (
    *("query", "key", "value", "mask", "slopes", "sinks", "out", "workspace", "lse", "starts", "ends"),
    *("key_more", "value_more", "bits"),
)
#: What a row without a key gives, as the kernel numbers it.
EMPTY_ROWS = {"zero": 0, "nan": 1, "mean": 2}
#: Maps of single scores and what divides a row, as the kernel numbers them; names as of ``regraft::attention_mapped``.
WEIGHTS = {"softmax": 0, "exp": 1, "sigmoid": 2, "relu": 3, "elu1": 4, "gelu": 5, "identity": 6}
NORMALISERS = {"sum": 0, "none": 1, "sum_eps": 2, "sum_abs": 3, "constant": 4}


class _Site(ctypes.Structure):
    """``Site`` in ``attention.cpp``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in _POINTERS),
        *((name, LONG) for name in ("batch", "heads", "kv_heads", "length", "keys", "head_dim", "value_dim")),
        *((f"{name}_strides", LONG * 3) for name in ("query", "key", "value", "out", "key_more", "value_more")),
        ("before", LONG),
        ("mask_strides", LONG * 4),
        ("span_strides", LONG * 2),
        ("spans", LONG),
        ("bit_strides", LONG * 3),
        *((name, FLOAT) for name in ("scale", "softcap", "constant")),
        *((name, INT) for name in ("empty_rows", "weights", "normaliser")),
    )


def attend(
    library: ctypes.CDLL,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    spans: Tensor | None,
    bits: Tensor | None,
    empty_rows: str,
    weights: str = "softmax",
    normaliser: str = "sum",
    constant: float = 0.0,
    key_more: Tensor | None = None,
    value_more: Tensor | None = None,
) -> NativeCall:
    """Attention of ``query`` ``[batch, heads, length, head_dim]``, ``key`` and ``value`` with ``kv_heads`` heads, all
    fp32 with any strides; the result is ``[batch, heads, length, value_dim]``, in memory ``[batch, length, heads, …]``.

    ``spans`` ``[2, batch or 1, heads or 1, length, count]``, int64, contiguous, says where the intervals of keys that
    a query sees start and end (``ir/mask/spans``); None is all keys. ``bits`` ``[batch or 1, heads or 1, length, …]``
    say of each whether it is seen in truth, as ``native/mask`` makes them. ``mask`` is added to the scaled scores; it
    broadcasts to ``[batch, heads, length, keys]``. ``slopes`` and ``sinks`` are ``[heads]``. ``empty_rows`` is a name
    of ``EMPTY_ROWS``; with ``weights`` of ``WEIGHTS`` that are no softmax, ``normaliser`` and ``constant`` say what
    divides a row, and there are no sinks. ``key_more`` and ``value_more`` are keys and values behind the others, as if
    they were joined.
    """
    batch, heads, length = query.shape[:3]
    out = query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)
    options = scale, softcap, constant, EMPTY_ROWS[empty_rows], WEIGHTS[weights], NORMALISERS[normaliser]
    return _call(library, query, (key, key_more), (value, value_more), mask, slopes, sinks, spans, bits, options, out)


def log_sum_exp(
    library: ctypes.CDLL,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    spans: Tensor | None,
    bits: Tensor | None,
) -> NativeCall:
    """``regraft::attention_lse`` of operands as of ``attend``: ``[batch, heads, length]``."""
    out = query.new_empty(query.shape[:3])
    options = scale, softcap, 0.0, EMPTY_ROWS["zero"], WEIGHTS["softmax"], NORMALISERS["sum"]
    return _call(library, query, (key, None), (None, None), mask, slopes, sinks, spans, bits, options, out)


def _call(
    library: ctypes.CDLL,
    query: Tensor,
    keys: tuple[Tensor, Tensor | None],
    values: tuple[Tensor | None, Tensor | None],
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    spans: Tensor | None,
    bits: Tensor | None,
    options: tuple[float | int, ...],
    out: Tensor,
) -> NativeCall:
    """The call that writes ``out``: attention to ``values``, or without them the log-sum-exps."""
    batch, heads, length, head_dim = query.shape
    key, key_more, value, value_more = (None if part is None else _rows_in_order(part) for part in (*keys, *values))
    assert key is not None
    query, kv_heads, before = _rows_in_order(query), key.shape[1], key.shape[2]
    count, value_dim = before + (0 if key_more is None else key_more.shape[2]), 0 if value is None else value.shape[3]
    shown = None if mask is None else _rows_in_order(mask).expand(batch, heads, length, count)
    held = (None if table is None else table.reshape(-1).contiguous() for table in (slopes, sinks))
    floats = library.regraft_attention_workspace(batch, heads, kv_heads, length, count, head_dim, value_dim)
    workspace = query.new_empty(floats) if floats else None
    starts, ends = (None, None) if spans is None else spans.unbind(0)
    most = 0 if starts is None else starts.shape[3]
    if most > MOST_SPANS:
        raise ValueError(f"{most} spans a row were given, the kernel takes {MOST_SPANS} at most")
    strides = (_strides(part)[:3] for part in (query, key, value, out, key_more, value_more))
    structure = (
        batch, heads, kv_heads, length, count, head_dim, value_dim,
        *strides, before, _strides(shown), _strides(starts)[:2], most, _strides(bits)[:3], *options,
    )  # fmt: skip
    results = (out, workspace, None) if value is not None else (None, workspace, out)
    tensors = (query, key, value, shown, *held, *results, starts, ends, key_more, value_more, bits)
    made = (out,) if workspace is None else (out, workspace)
    return NativeCall("regraft_attention", _Site, tensors, structure, out, made)


def _strides(table: Tensor | None) -> tuple[int, ...]:
    """Strides as the kernel takes them: nought along what there is once."""
    if table is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else step for size, step in zip(table.shape, table.stride(), strict=True))


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions take and return."""
    library.regraft_attention_workspace.argtypes = [LONG] * 7
    library.regraft_attention_workspace.restype = LONG
    library.regraft_attention.restype = None


def check(library: ctypes.CDLL) -> str:
    """Empty where the library computes a causal site of grouped queries as PyTorch does, else what is wrong."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 70, 20, generator=generator, dtype=torch.float32) for heads in (4, 2, 2))
    causal = torch.stack((torch.zeros(1, 70, dtype=torch.int64), torch.arange(1, 71)[None]))[:, :, None, :, None]
    given = attend(library, query, key, value, None, None, None, 0.3, 0.0, causal, None, "nan").run(library)
    with torch.no_grad():
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.3, enable_gqa=True
        )
    error = float((given - wanted).norm() / wanted.norm())
    return "" if error < 1e-5 else f"attention differs from PyTorch's by {error:.1e} on a sample"


def _rows_in_order(tensor: Tensor) -> Tensor:
    """The kernel takes any strides but the last, which is one (or nought, where a single column is spread)."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
