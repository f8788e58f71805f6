"""Which weights of the model nothing reads any more, while a program is lowered step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx

from regraft.codegen.cpu.context import Context
from regraft.ir.program import Program

#: Is called with a tensor of the model that compiled code will not read: its packed copy stands for it.
ReadLast = Callable[[Tensor], Any]


class LastReads:
    """Counts the calls that read each weight of the model, itself or through one derived from it."""

    def __init__(self, program: Program, tell: ReadLast) -> None:
        self._program, self._tell = program, tell
        calls = [node for node in program.graph.nodes if node.op != "placeholder"]
        self._left = Counter(id(tensor) for node in calls for tensor in self._weights(node))

    def lowered(self, context: Context, nodes: Iterable[fx.Node]) -> None:
        """These calls are lowered; tell what they were the last to read, and the lowered graph does not hold."""
        for tensor in (tensor for node in nodes for tensor in self._weights(node)):
            self._left[id(tensor)] -= 1
            if not self._left[id(tensor)] and not context.holds(tensor):
                self._tell(tensor)

    def _weights(self, node: fx.Node) -> list[Tensor]:
        """The model's tensors that a call reads."""
        store = self._program.weights
        names = (self._program.weight_name(operand) for operand in node.all_input_nodes)
        return [store.originals[source] for name in names if name is not None for source in store.sources(name)]
