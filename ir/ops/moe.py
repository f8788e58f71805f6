"""``regraft::moe``: the routed experts of a mixture-of-experts block; the router and shared experts stay
outside.

``out[t] = sum over k of weight[t, k] * expert(index[t, k], hidden[t])`` (Shazeer et al., "Outrageously Large
Neural Networks", 2017), where an expert is ``down(gate_function(first(x)))``. Each expert's first projection
holds the gate and the value that it multiplies (``up``) in one tensor or in two; ``layout`` says how:

========================  ==========================================================================
``"gate_up"``             one tensor, the gate's rows first, then those of up
``"up_gate"``             one tensor, the rows of up first
``"interleaved"``         one tensor, gate on the even rows, up on the odd rows
``"separate"``            ``first`` is the gate's tensor, ``up`` the other
``"single"``              no gate: ``activation(first(x))``
========================  ==========================================================================

Weights are ``[experts, out, in]``, or ``[experts, in, out]`` where ``transposed``. The gate function is
``activation(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)``; ``limit`` None does not clamp. The
activation ``"swish"`` is ``x * sigmoid(alpha * x)``, every other name is one of ``ACTIVATIONS``.

The expert index is explicit, and a pair whose index lies outside ``[0, experts)`` adds nothing: a shard of
the experts computes its part of the sum from an index shifted by its first expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.nodes import arguments, concrete
from regraft.ir.ops.activation import activate
from regraft.ir.ops.registry import Cost, elements, register, tensor_bytes

LAYOUTS = ("gate_up", "up_gate", "interleaved", "separate", "single")


@dataclass(frozen=True)
class GateFunction:
    """What an expert does between its projections; the fields are the operator's arguments of the same
    names."""

    activation: str = "silu"
    layout: str = "gate_up"
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r} of expert weights; known: {', '.join(LAYOUTS)}")

    def __call__(self, first: Tensor, up: Tensor | None = None) -> Tensor:
        """``[..., intermediate]`` from the first projection's ``[..., intermediate or twice that]``."""
        gate, value = self.split(first, up)
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            value = value.clamp(-self.limit, self.limit) if value is not None else None
        activated = gate * torch.sigmoid(gate * self.alpha) if self.activation == "swish" else self._activate(gate)
        if value is None:
            return activated
        return activated * (value + self.up_offset if self.up_offset else value)

    def split(self, first: Tensor, up: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The gate and the value it multiplies, by the layout."""
        if self.layout in ("separate", "single"):
            return first, up
        if self.layout == "interleaved":
            return first[..., ::2], first[..., 1::2]
        one, other = first.chunk(2, dim=-1)
        return (one, other) if self.layout == "gate_up" else (other, one)

    def _activate(self, gate: Tensor) -> Tensor:
        return activate(gate, self.activation)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """``x [rows, in]`` through one expert's projection, ``[out, in]`` or ``[in, out]`` where
    ``transposed``."""
    return torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)


def reference(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
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
) -> Tensor:
    """The definition: ``hidden [tokens, hidden]``, ``index`` and ``weight [tokens, top_k]``; the sum over k
    is kept in fp32 at least. The result is ``[tokens, hidden]`` in the common type of ``hidden`` and
    ``weight``. Raises ``ValueError`` for a layout or an activation that is not known."""
    function = GateFunction(activation, layout, alpha, limit, up_offset)
    common = torch.promote_types(hidden.dtype, weight.dtype)
    total = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(common, torch.float32))
    for expert in range(first.shape[0]):
        token, slot = torch.where(index == expert)
        rows = hidden[token]
        value = None if up is None else project(rows, up[expert], _row(up_bias, expert), transposed)
        inner = function(project(rows, first[expert], _row(first_bias, expert), transposed), value)
        out = project(inner, down[expert], _row(down_bias, expert), transposed)
        total.index_add_(0, token, out.to(total.dtype) * weight[token, slot, None].to(total.dtype))
    return total.to(common)


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def _fake(
    hidden: Tensor,
    weight: Tensor,
    activation: str,
    layout: str,
    alpha: float,
    limit: float | None,
    up_offset: float,
    **_: Any,
) -> Tensor:
    GateFunction(activation, layout, alpha, limit, up_offset)
    common = torch.promote_types(hidden.dtype, weight.dtype)
    return torch.empty(hidden.shape, dtype=common, device=hidden.device)


def cost(node: fx.Node) -> Cost:
    """Every pair passes its expert's projections; of the weights, only those of experts that can be hit are
    read."""
    given = arguments(node)
    hidden, index, first = (given[name].meta["val"] for name in ("hidden", "index", "first"))
    pairs, experts = elements(index), concrete(first.shape[0])
    held = [
        given[name].meta["val"] for name in ("first", "down", "up", "first_bias", "down_bias", "up_bias") if given[name]
    ]
    products = sum(elements(value) for value in held if value.dim() == 3)
    touched = min(1.0, pairs / max(experts, 1))
    moved = touched * sum(tensor_bytes(value) for value in held)
    activations = sum(tensor_bytes(value) for value in (hidden, index, given["weight"].meta["val"], node.meta["val"]))
    return Cost(2.0 * pairs * products / max(experts, 1), moved + activations)


moe = register(
    "moe",
    "(Tensor hidden, Tensor index, Tensor weight, Tensor first, Tensor down, Tensor? up=None, "
    "Tensor? first_bias=None, Tensor? down_bias=None, Tensor? up_bias=None, *, str activation='silu', "
    "str layout='gate_up', bool transposed=False, float alpha=1.0, float? limit=None, "
    "float up_offset=0.0) -> Tensor",
    reference,
    _fake,
    cost,
)
