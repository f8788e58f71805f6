"""Token Prepending (Fu et al., arXiv:2412.11556): the last token's state stands in an early place while layers run.

The prompt holds a placeholder at ``place``; before each layer from ``first`` up to ``last``, its state is overwritten
by that of the last token, so that with a causal mask earlier tokens' successors see what came after. Training-free,
changes the function. The edge from token to token is an edge of the graph, not a change of the modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regraft.ir.driver import Session
from regraft.ir.nodes import shape
from regraft.ir.program import Program
from regraft.passes.attention.errors import AttentionError
from regraft.passes.attention.lossy import attention_at, builder, log_fired, log_refused
from regraft.passes.attention.stream import Layer, layers
from regraft.passes.base import Pass
from regraft.passes.refused import Refused

aten = torch.ops.aten


@dataclass(frozen=True)
class PrependToken(Pass):
    """Overwrite token ``place`` by the last one in front of each of the layers ``first`` to ``last - 1``. The last
    token is that of the padded batch: prompts are padded on the left."""

    place: int
    first: int
    last: int

    def run(self, program: Program, session: Session) -> int:
        if self.first >= self.last or session.fuel.empty:
            return 0
        try:
            found = layers(program)
        except Refused as refused:
            log_refused(session, self, attention_at(program, 0), refused)
            return 0
        if not 0 <= self.first < self.last <= len(found):
            raise AttentionError(
                f"layers {self.first} to {self.last} were given; the program has {len(found)}, numbered from 0"
            )
        for layer in found[self.first : self.last]:
            self._overwrite(program, layer)
        log_fired(session, self, found[self.first].entry, f"token {self.place}, layers {self.first} to {self.last - 1}")
        program.graph.lint()
        return 1

    def _overwrite(self, program: Program, layer: Layer) -> None:
        entry = layer.entry
        tokens = shape(entry)[1]
        if isinstance(tokens, int) and not 0 <= self.place < tokens - 1:
            raise AttentionError(f"place {self.place} was given; a placeholder lies before the last of {tokens} tokens")
        build = builder(program, entry.next, entry, self.name)
        last = build.call(aten.slice.Tensor, entry, 1, -1, 9223372036854775807)
        parts = [last, build.call(aten.slice.Tensor, entry, 1, self.place + 1, 9223372036854775807)]
        if self.place:
            parts.insert(0, build.call(aten.slice.Tensor, entry, 1, 0, self.place))
        joined = build.call(aten.cat.default, parts, 1)
        made = set(build.made)
        entry.replace_all_uses_with(joined, lambda user: user not in made, propagate_meta=False)
