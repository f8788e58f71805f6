"""The token kernels of the catalogue (``catalogue.py``): plans and merges at the sizes of models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from regraft.codegen.rowwise.expand import Calls
from regraft.codegen.triton.emit import Kernel, dtype_name
from regraft.codegen.triton.rowwise.samples import Writes, written
from regraft.codegen.triton.tokens.merge import MergeSpec, emit_merge_tokens
from regraft.codegen.triton.tokens.plan import emit_plan
from regraft.codegen.triton.tokens.plan_spec import PlanSpec
from regraft.codegen.triton.tokens.unmerge import UnmergeSpec, emit_unmerge
from regraft.ir import ops

aten = torch.ops.aten
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


def plan_specs() -> dict[str, PlanSpec]:
    """Plans by name: every matching in every element type, with padding, causal, from a mean over heads."""
    found: dict[str, PlanSpec] = {}
    for kind in (_BF16, _FP16, _FP32):
        name = dtype_name(kind)
        found |= {
            f"plan bipartite, mean of heads {name} 64": PlanSpec(kind, 64, heads=True),
            f"plan bipartite {name} 768": PlanSpec(kind, 768),
            f"plan energy, padding {name} 64": PlanSpec(kind, 64, "energy", heads=True, keep=True),
            f"plan distinct {name} 64": PlanSpec(kind, 64, "distinct", scores=kind),
            f"plan drop {name} 64": PlanSpec(kind, 64, "drop", heads=True, scores=kind),
            f"plan fuse {name} 64": PlanSpec(kind, 64, "fuse", heads=True, scores=kind, keep=True),
        }
    return found | {"plan bipartite, causal, padding bfloat16 128": PlanSpec(_BF16, 128, keep=True, causal=True)}


def token_samples() -> dict[str, Callable[[], Kernel]]:
    """Emitters by name."""
    found: dict[str, Callable[[], Kernel]] = {name: partial(emit_plan, spec) for name, spec in plan_specs().items()}
    for kind in (_BF16, _FP16, _FP32):
        name = dtype_name(kind)
        found[f"merge {name} 768"] = partial(_merge, MergeSpec(kind, 768, sizes=True))
        found[f"merge, logs, layer norm {name} 768"] = partial(_merge, MergeSpec(kind, 768, True, True), _layer_norm)
        found[f"merge, logs, rms norm {name} 4096"] = partial(_merge, MergeSpec(kind, 4096, True, True), _rms_norm)
        found[f"unmerge {name} 768"] = partial(emit_unmerge, UnmergeSpec(kind, 768))
    return found


def _merge(spec: MergeSpec, norm: Writes | None = None) -> Kernel:
    if norm is None:
        return emit_merge_tokens(spec).kernel
    width = (spec.width,)
    sizes = ((8, 189, spec.width), width, width) if norm is _layer_norm else ((8, 189, spec.width), width)
    nodes, _, mode = written(spec.dtype, norm, sizes)
    merged = nodes[0].args[0]
    assert isinstance(merged, fx.Node)
    return emit_merge_tokens(spec, nodes, merged, mode).kernel


def _layer_norm(build: Calls, x: Any, weight: Any, bias: Any) -> list[fx.Node]:
    return [build.call(aten.layer_norm.default, x, [int(x.meta["val"].shape[-1])], weight, bias, 1e-6)]


def _rms_norm(build: Calls, x: Any, weight: Any) -> list[fx.Node]:
    return [build.call(ops.rms_norm, x, weight, 1e-6)]
