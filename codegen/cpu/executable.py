"""A lowered program, ready to run."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from regraft.codegen.cpu.calls import function_of


class Executable:
    """Calls the lowered graph: flat user inputs in, flat outputs (mutated buffers first) out.

    ``module`` is the lowered ``fx.GraphModule``, to be read and measured node by node; ``tuning`` the kernel decisions
    that it was built with, as JSON lines.
    """

    def __init__(self, module: fx.GraphModule, tuning: bytes) -> None:
        self.module = module
        self.tuning = tuning
        self._function = function_of(module)

    def __call__(self, *inputs: Any) -> Any:
        with torch.no_grad():
            return self._function(*inputs)
