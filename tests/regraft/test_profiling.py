"""Work of kernels that the cost model does not know is that of what they were lowered from, counted once."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from regraft.ir.capture import capture
from regraft.ir.device import find_device
from regraft.profiling import _with_work_of_sources
from regraft.report import OperatorRow


def test_unknown_kernels_take_the_work_of_their_source() -> None:
    program = capture(nn.Linear(4, 3, bias=False).eval(), (torch.ones(2, 4),))
    (linear,) = (node for node in program.graph.nodes if node.op == "call_function")
    lowered = fx.Graph()
    kernels = [lowered.call_function(operator.add, (place, 0)) for place in range(3)]
    kernels[0].meta["source"] = kernels[1].meta["source"] = linear.name
    rows = [OperatorRow(node=node.name, operator="kernel", known=False) for node in kernels]
    found = _with_work_of_sources(rows, lowered, program, find_device("cpu"))
    assert [(row.flops, row.known) for row in found] == [(2.0 * 2 * 4 * 3, True), (0.0, False), (0.0, False)]
