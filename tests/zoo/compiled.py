"""Running a system through the default pipeline and the CPU lowering, and its own fp64 run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.codegen.cpu.executable import Executable
from regraft.codegen.cpu.lower import lower
from regraft.ir import ops
from regraft.ir.capture import capture
from regraft.ir.driver import Session
from regraft.ir.nodes import arguments
from regraft.ir.program import Program
from regraft.ir.verify import relative_l2
from regraft.passes.pipeline import default_pipeline


@dataclass
class Compiled:
    """A system after the pipeline: its graph, what happened, and what runs."""

    program: Program
    session: Session
    executable: Executable
    args: tuple[Tensor, ...]

    def attentions(self) -> list[tuple[str, str]]:
        """Kind and mask of each attention, in the order of the graph."""
        kinds = {ops.attention: "softmax", ops.attention_mapped: "mapped"}
        found = [(node, kinds[node.target]) for node in self.program.graph.nodes if node.target in kinds]
        return [(kind, str(arguments(node)["mask"])) for node, kind in found]

    def count(self, target: Any) -> int:
        """How many calls of an operator are left."""
        return sum(node.target is target for node in self.program.graph.nodes)

    def lowered(self) -> list[str]:
        """The names of what the lowered graph calls."""
        return [getattr(node.target, "__name__", str(node.target)) for node in self.executable.module.graph.nodes]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in eval mode; equal calls, equal weights. Running statistics and norms are not left at 0 and 1."""
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
    return model


def draw(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def compiled(model: nn.Module, *args: Tensor) -> Compiled:
    """The system, checked against its own formula in fp64: fp32 rounding is all that may differ."""
    program, session = capture(model, args), Session()
    default_pipeline("cpu").run(program, session)
    executable = lower(program)
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(*(a.double() if a.is_floating_point() else a for a in args))
    out = executable(*args)[0]
    assert out.dtype == torch.float32
    assert relative_l2(out.double(), wanted) <= 1e-6
    assert not [refusal for refusal in session.log.refusals if refusal.kind == "rolled back"]
    return Compiled(program, session, executable, args)
