"""What a kernel of routed experts is emitted for: everything about a site that its text depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.rowwise.operators import FLOATS
from regraft.ir.nodes import arguments, dtype, shape
from regraft.ir.ops.activation import ACTIVATIONS
from regraft.ir.ops.moe import LAYOUTS


@dataclass(frozen=True)
class ExpertsSpec:
    """Sizes and options of ``regraft::moe``, by its names; ``routing`` is the element type of the routing weights. The
    numbers of tokens and of experts of a token reach the kernel at run time."""

    dtype: torch.dtype
    routing: torch.dtype
    experts: int
    hidden: int
    intermediate: int
    layout: str = "gate_up"
    activation: str = "silu"
    transposed: bool = False
    first_bias: bool = False
    up_bias: bool = False
    down_bias: bool = False
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise Unfusable(f"experts of layout {self.layout!r}")
        if self.activation not in (*ACTIVATIONS, "swish"):
            raise Unfusable(f"experts with activation {self.activation!r}")
        if self.dtype not in FLOATS or self.routing not in FLOATS:
            raise Unfusable(f"experts in {self.dtype}, routed in {self.routing}")

    @property
    def gated(self) -> bool:
        """Whether a second projection is multiplied with the activated one."""
        return self.layout != "single"

    @property
    def parts(self) -> tuple[tuple[str, int, int], ...]:
        """Where gate and up lie: the weight, its first row, and the step to the next."""
        wide = self.intermediate
        return {
            "gate_up": (("first", 0, 1), ("first", wide, 1)),
            "up_gate": (("first", wide, 1), ("first", 0, 1)),
            "interleaved": (("first", 0, 2), ("first", 1, 2)),
            "separate": (("first", 0, 1), ("up", 0, 1)),
            "single": (("first", 0, 1),),
        }[self.layout]

    @property
    def operands(self) -> tuple[str, ...]:
        """The operator's tensors, in order."""
        found = ["hidden", "index", "weight", "first", "down"]
        found += ["up"] if self.layout == "separate" else []
        held = (("first_bias", self.first_bias), ("down_bias", self.down_bias), ("up_bias", self.up_bias))
        return (*found, *(name for name, present in held if present))

    def sizes(self, name: str) -> tuple[int, ...]:
        """The shape of a weight or bias."""
        rows = self.intermediate * (2 if self.layout in ("gate_up", "up_gate", "interleaved") else 1)
        out, summed = {
            "first": (rows, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }[name.removesuffix("_bias")]
        if name.endswith("_bias"):
            return self.experts, out
        return (self.experts, summed, out) if self.transposed else (self.experts, out, summed)


def experts_spec(node: fx.Node) -> ExpertsSpec:
    """The spec of a ``regraft::moe`` site; raises ``Unfusable`` with the reason where no kernel is emitted for it."""
    given: dict[str, Any] = arguments(node)
    weights = [given[name] for name in ("first", "down", "up") if given[name] is not None]
    types = {dtype(tensor) for tensor in (given["hidden"], *weights)}
    if len(types) > 1:
        raise Unfusable(f"{node.name}: tokens and weights are {', '.join(sorted(map(str, types)))}")
    if any(not isinstance(size, int) for tensor in weights for size in shape(tensor)):
        raise Unfusable(f"{node.name}: a size of the experts' weights is symbolic")
    experts, *both = shape(given["down"])
    hidden, intermediate = reversed(both) if given["transposed"] else both
    options = ("layout", "activation", "transposed", "alpha", "limit", "up_offset")
    spec = ExpertsSpec(
        dtype=types.pop(),
        routing=dtype(given["weight"]),
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        first_bias=given["first_bias"] is not None,
        up_bias=given["up_bias"] is not None,
        down_bias=given["down_bias"] is not None,
        **{name: given[name] for name in options},
    )
    for name in spec.operands[3:]:
        if tuple(shape(given[name])) != spec.sizes(name):
            raise Unfusable(f"{node.name}: {name} is {list(shape(given[name]))}, expected {list(spec.sizes(name))}")
    return spec
