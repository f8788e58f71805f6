"""Routed experts on the CPU: ``pack_moe`` once, ``run_moe`` a call.

In fp32 with a SiLU gate they are the native kernel's (``native/experts.py``); what follows is for the others, with
operators that PyTorch ships. Pairs are sorted by expert once, and each expert that has any runs on one contiguous
segment of rows. Weights are held once, as ``[experts, in, out]`` with gate and up in two halves. Measured on one core
of an AMD EPYC (CPU time, 8 experts, 2 a token): against products with oneDNN's packed weights, ``_grouped_mm``,
gathered weights, a dense product over all experts and a search for each expert's tokens, this is level or faster from
1 to 2048 tokens. From ``_ROWS_APART`` rows on, gate and up are two products, whose results are activated and
multiplied in place; below, one product costs less than two calls.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regraft.codegen.cpu.native import experts
from regraft.codegen.cpu.native.kernels import EXPERTS, NATIVE
from regraft.codegen.cpu.native_operators import experts_native
from regraft.ir.ops.moe import GateFunction

_ROWS_APART = 64


@dataclass(frozen=True, eq=False)
class PackedMoe:
    """Prepared weights: ``first [experts, hidden, width]``, ``down [experts, intermediate, hidden]``;
    ``width`` is ``intermediate``, or twice that with the gate's columns first. The layout of ``function`` is
    "separate" or "single"."""

    first: Tensor
    down: Tensor
    first_bias: Tensor | None
    down_bias: Tensor | None
    function: GateFunction

    def expert(self, number: int, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """One expert on ``rows [n, hidden]``."""
        inner = self._inner(self.first[number], _row(self.first_bias, number), rows)
        return _product(inner, self.down[number], _row(self.down_bias, number), out)

    def _inner(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        if self.function.layout == "single":
            return self.function(_product(rows, weight, bias))
        middle = weight.shape[1] // 2
        if rows.shape[0] < _ROWS_APART:
            both = _product(rows, weight, bias)
            gate, up = both[:, :middle], both[:, middle:]
        else:
            biases = (None, None) if bias is None else (bias[:middle], bias[middle:])
            gate = _product(rows, weight[:, :middle], biases[0])
            up = _product(rows, weight[:, middle:], biases[1])
        if self.function == _SWIGLU:
            silu = torch.ops.aten.silu_ if gate.is_contiguous() else torch.ops.aten.silu
            return silu(gate).mul_(up)  # type: ignore[no-any-return]
        return self.function(gate, up)


_SWIGLU = GateFunction("silu", "separate")


def pack_moe(
    first: Tensor,
    down: Tensor,
    up: Tensor | None = None,
    first_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    layout: str = "gate_up",
    transposed: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> PackedMoe | experts.PackedExperts:
    """Prepare the weights of ``regraft::moe``; the arguments are the operator's. Weights that are stored the
    right way are not copied. Raises ``ValueError`` for a layout that is not known."""
    function = GateFunction(activation, layout, alpha, limit, up_offset)
    if not transposed:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
        up = None if up is None else up.transpose(1, 2)
    first, down, up = first.detach(), down.detach(), None if up is None else up.detach()
    settled = replace(function, layout="single" if layout == "single" else "separate")
    if settled == _SWIGLU and first.dtype == torch.float32 and not EXPERTS.missing():
        gates = _halves(first, up, layout)
        gate_bias, up_bias = (None, None) if first_bias is None else _halves(first_bias, up_bias, layout)
        return experts.pack(NATIVE.library(), *gates, down, gate_bias, up_bias, down_bias)
    first = _gate_first(first, up, layout)
    if first_bias is not None:
        first_bias = _gate_first(first_bias.detach(), up_bias, layout).contiguous()
    return PackedMoe(first.contiguous(), down.contiguous(), first_bias, down_bias, settled)


def _halves(first: Tensor, up: Tensor | None, layout: str) -> tuple[Tensor, Tensor]:
    """The columns of the gate, and those of up."""
    if layout == "separate":
        assert up is not None
        return first, up
    if layout == "interleaved":
        return first[..., ::2], first[..., 1::2]
    one, other = first.chunk(2, -1)
    return (one, other) if layout == "gate_up" else (other, one)


def _gate_first(first: Tensor, up: Tensor | None, layout: str) -> Tensor:
    """The columns of the gate, then those of up."""
    return first if layout in ("single", "gate_up") else torch.cat(_halves(first, up, layout), -1)


def run_moe(packed: PackedMoe | experts.PackedExperts, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """``regraft::moe`` of ``hidden [tokens, hidden]`` by ``index`` and ``weight [tokens, top_k]``."""
    common = torch.promote_types(hidden.dtype, weight.dtype)
    shares = weight.to(torch.promote_types(common, torch.float32))
    if isinstance(packed, experts.PackedExperts):
        out: Tensor = experts_native(packed, hidden, index, shares)
        return out
    if hidden.shape[0] == 1:
        return _one_token(packed, hidden, index, shares).to(common)
    ids, order = torch.sort(index.reshape(-1))
    out = _segments(packed, hidden.index_select(0, order // index.shape[1]), ids)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0])
    place = place.view(index.shape)
    total = torch.zeros(hidden.shape, dtype=shares.dtype)
    for k in range(index.shape[1]):
        total.addcmul_(out.index_select(0, place[:, k]).to(shares.dtype), shares[:, k : k + 1])
    return total.to(common)


def _segments(packed: PackedMoe, rows: Tensor, ids: Tensor) -> Tensor:
    """Every expert on the rows whose sorted ``ids`` are its own; rows of no expert give zero."""
    experts = packed.first.shape[0]
    ends = torch.searchsorted(ids, torch.arange(experts + 1, dtype=ids.dtype)).tolist()
    out = torch.empty_like(rows)
    out[: ends[0]].zero_()
    out[ends[-1] :].zero_()
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        if start < end:
            packed.expert(number, rows[start:end], out[start:end])
    return out


def _one_token(packed: PackedMoe, hidden: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    """Decoding: every expert has the same one row, there is nothing to sort."""
    total = torch.zeros(hidden.shape, dtype=shares.dtype)
    for number, share in zip(index[0].tolist(), shares[0].tolist(), strict=True):
        if 0 <= number < packed.first.shape[0]:
            total.add_(packed.expert(number, hidden), alpha=share)
    return total


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight) if out is None else torch.mm(x, weight, out=out)
    return torch.addmm(bias, x, weight) if out is None else torch.addmm(bias, x, weight, out=out)


def _row(bias: Tensor | None, number: int) -> Tensor | None:
    return None if bias is None else bias[number]
