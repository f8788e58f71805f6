"""What the lowering of one program to the CPU shares: the new graph, values in two shapes, and bound tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.nodes import rank, shape
from regraft.ir.program import Program

aten = torch.ops.aten


@dataclass
class Lowered:
    """A value of the lowered graph: as the program shapes it, and flattened to ``[rows, features]``.

    Row-wise operators work on the flat form, so that between linear layers nothing is reshaped; either form is made
    when it is first asked for. ``fresh`` says that the flat form is a buffer of its own that nothing else aliases.
    """

    full: fx.Node | None = None
    flat: fx.Node | None = None
    fresh: bool = False


@dataclass
class Emitter:
    """Writes calls into a graph, and binds tensors to the module that runs it."""

    root: torch.nn.Module
    graph: fx.Graph
    _bound: dict[int, fx.Node] = field(default_factory=dict)
    _keep: list[Any] = field(default_factory=list)
    _shared: dict[Any, Any] = field(default_factory=dict)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in the lowered graph."""
        return self.graph.call_function(target, args, kwargs)

    def bind(self, value: Any, hint: str) -> fx.Node:
        """A tensor or packed object as an attribute of the lowered module; the same one is bound once."""
        if id(value) not in self._bound:
            name = f"{''.join(c if c.isalnum() else '_' for c in hint)}_{len(self._bound)}"
            setattr(self.root, name, value)
            self._keep.append(value)  # an id is only good while its tensor lives
            self._bound[id(value)] = self.graph.get_attr(name)
        return self._bound[id(value)]

    def holds(self, tensor: Tensor) -> bool:
        """Whether the module that runs the graph reads the memory of ``tensor`` itself."""
        memory = tensor.untyped_storage().data_ptr()
        bound = (value for value in self._keep if isinstance(value, Tensor) and value.layout is torch.strided)
        return any(value.untyped_storage().data_ptr() == memory for value in bound)

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """What several sites need (a mask, a packed weight): made at the first, found by ``key`` at the others."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


@dataclass
class Context(Emitter):
    """The state of lowering one program."""

    program: Program = field(kw_only=True)
    values: dict[fx.Node, Lowered] = field(default_factory=dict)
    #: Lowers a call inside a region that another lowering wants to read after all.
    lower_alone: Callable[[fx.Node], None] | None = None

    def weight(self, node: fx.Node) -> Tensor:
        """The tensor of a weight placeholder; raises ``KeyError`` for any other node."""
        name = self.program.weight_name(node)
        if name is None:
            raise KeyError(f"{node.name} is not a weight")
        return self.program.weights.get(name)

    def is_weight(self, node: Any) -> bool:
        """Whether a node is a weight that does not change while the model runs."""
        if not isinstance(node, fx.Node):
            return False
        name = self.program.weight_name(node)
        return name is not None and name not in set(self.program.mutated().values())

    def value(self, node: fx.Node) -> fx.Node:
        """The lowered value in the program's shape."""
        held = self.values.get(node)
        if held is None and node.op == "placeholder":
            held = self.values[node] = Lowered(full=self.bind(self.weight(node), node.name))
        if held is None and node.op == "call_function" and self.lower_alone is not None:
            self.lower_alone(node)
            held = self.values[node]
        if held is None:
            raise KeyError(f"{node.name} was not lowered")
        if held.full is None:
            assert held.flat is not None
            held.full = self.call(aten.reshape.default, held.flat, self.sizes(node))
        return held.full

    def flat(self, node: fx.Node) -> fx.Node:
        """The lowered value as ``[rows, features]``."""
        held = self.values.get(node)
        if held is None or (held.flat is None and held.full is None):
            self.value(node)
            held = self.values[node]
        if held.flat is None:
            full = self.value(node)
            held.flat = (
                full if rank(node) == 2 else self.call(aten.reshape.default, full, [-1, self._features(node, full)])
            )
        return held.flat

    def has_flat(self, node: Any) -> bool:
        """Whether the flat form exists already."""
        return isinstance(node, fx.Node) and node in self.values and self.values[node].flat is not None

    def sizes(self, node: fx.Node) -> list[Any]:
        """The program's shape of ``node`` as arguments: ints, with one -1 where a size is symbolic."""
        sizes = shape(node)
        symbolic = [dim for dim, size in enumerate(sizes) if not isinstance(size, int)]
        if not symbolic:
            return list(sizes)
        if len(symbolic) == 1:
            return [-1 if dim in symbolic else size for dim, size in enumerate(sizes)]
        raise ValueError(f"{node.name} has more than one symbolic size")

    def can_unflatten(self, node: fx.Node) -> bool:
        """Whether the program's shape can be recovered from the flat form."""
        return sum(not isinstance(size, int) for size in shape(node)) <= 1

    def _features(self, node: fx.Node, full: fx.Node) -> int | fx.Node:
        """The size of the last dim, in the lowered graph where it is symbolic."""
        last = shape(node)[-1]
        if isinstance(last, torch.SymInt) and last.node.expr.is_number:  # a symbol that the capture found to be fixed
            return int(last)
        return last if isinstance(last, int) else self.call(aten.sym_size.int, full, -1)
