"""Counting what a graph means once it is recognised: the report's first line."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.passes.base import Pass

aten = torch.ops.aten

#: Operators of PyTorch that are sites by themselves.
_KINDS: dict[Any, str] = {
    aten.layer_norm.default: "layer_norm",
    aten.gelu.default: "activation",
    aten.silu.default: "activation",
}
#: Kinds that every report names, found or not.
_ALWAYS = ("attention", "layer_norm", "rms_norm", "rope", "glu", "moe")


@dataclass(frozen=True)
class CountSites(Pass):
    """Write the number of sites of each kind to the log; changes nothing."""

    def run(self, program: Program, session: Session) -> int:
        counts = Counter(dict.fromkeys(_ALWAYS, 0))
        for node in program.graph.nodes:
            if node.op == "call_function":
                semantic = ops.OPERATORS.get(node.target)
                kind = semantic.kind if semantic is not None else _KINDS.get(node.target)
                counts.update([kind] if kind else [])
        session.log.sites = dict(counts)
        return 0
