"""``regraft::linear_scan``: a linear recurrence over time, as a moving average or a gated state has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.ops.registry import Cost, elements, register, traffic


def reference(decay: Tensor, added: Tensor, start: Tensor) -> Tensor:
    """The definition: ``h_0 = start``, ``h_t = decay_t * h_(t-1) + added_t``.

    ``decay`` is ``[batch, steps, width or 1]``, ``added`` ``[batch, steps, width]``, ``start`` ``[batch, width]``. The
    result ``[batch, steps + 1, width]`` begins with ``start`` and has its type; states are kept in fp32 at least.
    """
    wide = torch.promote_types(start.dtype, torch.float32)
    state = start.to(wide)
    states = [state]
    for factor, term in zip(decay.to(wide).unbind(1), added.to(wide).unbind(1), strict=True):
        state = torch.addcmul(term, factor, state)
        states.append(state)
    return torch.stack(states, dim=1).to(start.dtype)


def _fake(added: Tensor, start: Tensor, **_: Any) -> Tensor:
    return start.new_empty((start.shape[0], added.shape[1] + 1, start.shape[1]))


def cost(node: fx.Node) -> Cost:
    """A product and a sum for each number."""
    return Cost(2.0 * elements(node.meta["val"]), traffic(node))


linear_scan = register("linear_scan", "(Tensor decay, Tensor added, Tensor start) -> Tensor", reference, _fake, cost)
