"""In-context vectors (Liu et al., arXiv:2311.06668): what demonstrations would do is added to each layer's output."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.nodes import shape
from regraft.ir.program import Program
from regraft.passes.attention.errors import AttentionError
from regraft.passes.attention.lossy import attention_at, builder, log_fired, log_refused
from regraft.passes.attention.stream import feed_forward, layers
from regraft.passes.base import Pass
from regraft.passes.refused import Refused


@dataclass(frozen=True)
class InContextVectors(Pass):
    """Turn what the feed-forward part of each layer gives towards ``vectors`` ``[layers, width]`` or ``[layers,
    vectors, width]`` by ``strength``, in fp32 whatever the model's type; 0 changes nothing. ``only`` names the layers;
    None is all."""

    vectors: Tensor = field(repr=False)
    strength: float
    only: tuple[int, ...] | None = None

    def run(self, program: Program, session: Session) -> int:
        if self.strength == 0 or session.fuel.empty:
            return 0
        try:
            found = layers(program)
            added = [
                feed_forward(layer, following.attention if following else None)
                for layer, following in zip(found, [*found[1:], None], strict=True)
            ]
        except Refused as refused:
            log_refused(session, self, attention_at(program, 0), refused)
            return 0
        chosen = range(len(found)) if self.only is None else self.only
        width = shape(added[0])[-1]
        if self.vectors.dim() not in (2, 3) or self.vectors.shape[0] != len(found) or self.vectors.shape[-1] != width:
            raise AttentionError(
                f"vectors {list(self.vectors.shape)} were given; the program has {len(found)} layers of width {width}: "
                "give [layers, width] or [layers, vectors, width]"
            )
        if any(not 0 <= number < len(found) for number in chosen):
            raise AttentionError(f"layers {list(chosen)} were given; the program has {len(found)}, numbered from 0")
        for number in chosen:
            node = added[number]
            build = builder(program, node.next, node, self.name)
            value = self.vectors[number].reshape(-1, width).to(node.meta["val"].device)
            directions = program.add_constant(f"in_context.{number}", value)
            _insert(node, build.call(ops.steer, node, directions, float(self.strength)))
        log_fired(session, self, added[0], f"{len(chosen)} layers, strength {self.strength:g}")
        program.graph.lint()
        return 1


def _insert(node: fx.Node, turned: fx.Node) -> None:
    """Give ``turned`` the other readers of ``node``."""
    node.replace_all_uses_with(turned, lambda user: user is not turned, propagate_meta=False)
