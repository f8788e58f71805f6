"""Operands for kernels of plans and of merges, drawn at random on a device."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from regraft.codegen.triton.tokens.plan_spec import PlanSpec
from regraft.ir.ops.plan_merge import reference as plan

_BATCH, _HEADS = 3, 5


def plan_operands(spec: PlanSpec, device: str, tokens: int, seed: int = 0) -> dict[str, Any]:
    """A value for each operand of a plan's kernel, by name; a sixth of the tokens of a sample are padding."""
    make = torch.Generator(device).manual_seed(seed)
    heads = (_HEADS,) if spec.heads else ()
    given: dict[str, Any] = {
        "metric": torch.randn(_BATCH, *heads, tokens, spec.width, generator=make, device=device).to(spec.dtype),
        "remove": tokens // 3,
        "prefix": 1,
        "suffix": 0,
        "margin": 0.3,
    }
    if spec.scores is not None:
        given["scores"] = torch.randn(_BATCH, tokens, generator=make, device=device).to(spec.scores)
    given["keep"] = torch.rand(_BATCH, tokens, generator=make, device=device) > 1 / 6
    return given


def merged_operands(module: ModuleType, device: str, tokens: int, seed: int = 0) -> dict[str, Any]:
    """The same for a kernel that merges, or puts tokens back; ``module`` is its loaded file."""
    make = torch.Generator(device).manual_seed(seed)
    kind, width = module.DTYPE, module.WIDTH.value

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=make, device=device)

    x = draw(_BATCH, tokens, width).to(kind)
    kept, sources, slots = plan(x, None, None, tokens // 3, "bipartite", 1, 0, False, 0.0)
    sizes = torch.randint(1, 9, (_BATCH, tokens), generator=make, device=device).float()
    weights = {name: draw(width).to(kind) for name in ("weight", "bias")}
    return {"x": x, "sizes": sizes, "kept": kept, "sources": sources, "slots": slots, **weights}
