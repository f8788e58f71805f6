"""Two stages of a sequence whose equal tokens are known from the graph: all tokens, and one for each that is distinct.

What is brought from the first to the second is read at the tokens that stay. That is right only for what is the same
for all tokens that such a one stands for, so that it is refused until it is proved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from regraft.ir.nodes import Builder
from regraft.ir.program import Program
from regraft.passes.refused import Refused
from regraft.passes.tokens.equal_places import EqualPlaces
from regraft.passes.tokens.layout import Layout, Span, batch_of, span_dim
from regraft.passes.tokens.stages import Reduction, Stages

aten = torch.ops.aten


@dataclass
class KnownStages(Stages):
    """``labels`` are the first place of each token's equals, the same in each sample; ``kept`` holds the places that
    stay, ``[tokens]``."""

    labels: tuple[int, ...] = field(kw_only=True)
    kept: fx.Node = field(init=False)

    def begin(self, build: Builder, program: Program) -> None:
        """Begin the second stage."""
        places = sorted(set(self.labels))
        gone = [place for place, label in enumerate(self.labels) if place != label]
        counts = Counter(self.labels)

        def held(numbers: Sequence[float]) -> fx.Node:
            return program.add_constant("tokens.equal", torch.tensor(numbers, device=self.device))

        def each(row: fx.Node) -> fx.Node:
            return build.call(aten.expand.default, row, [self.batch, *row.meta["val"].shape])

        self.kept = held(places)
        kept, sources, slots = (each(row) for row in (self.kept, held(gone), held(self.slots)))
        self.reductions.append(Reduction(kept, sources, slots, None, len(gone)))
        self.sizes.append(each(held([float(counts[place]) for place in places])))

    @property
    def slots(self) -> list[int]:
        """Where each token is found at the second stage."""
        slot = {label: place for place, label in enumerate(sorted(set(self.labels)))}
        return [slot[label] for label in self.labels]

    def bring(
        self, build: Builder, node: fx.Node, layout: Layout, stages: tuple[int, int], target: Layout, merge: bool
    ) -> fx.Node:
        """``node`` at the tokens that stay; what is the same for every sample is not repeated for each."""
        dim = span_dim(layout)
        if stages[0] == stages[1] or dim is None:
            return node
        if batch_of(layout) is not None or layout[dim] != (Span(0, self.tokens),):
            return super().bring(build, node, layout, stages, target, merge=False)
        return self._once(("bring", node, dim), lambda: build.call(aten.index_select.default, node, dim, self.kept))


@dataclass
class EqualStages(KnownStages):
    """Brings only what ``equal`` proves to be the same for equal tokens; ``unproved`` brings whatever it is given."""

    equal: EqualPlaces = field(kw_only=True)
    unproved: KnownStages = field(init=False)

    def begin(self, build: Builder, program: Program) -> None:
        """Begin the second stage."""
        super().begin(build, program)
        given = self.tokens, self.batch, self.device, self.reductions, self.sizes
        self.unproved = KnownStages(*given, labels=self.labels)
        self.unproved.kept = self.kept

    def bring(
        self, build: Builder, node: fx.Node, layout: Layout, stages: tuple[int, int], target: Layout, merge: bool
    ) -> fx.Node:
        """``node`` at the tokens that stay. Raises ``Refused`` where it may differ between equal tokens."""
        dim = span_dim(layout)
        if stages[0] != stages[1] and dim is not None:
            whole = layout[dim] == (Span(0, self.tokens),)
            if not whole or not self.are_alike(self.equal.keys(node, dim)):
                raise Refused("equal tokens meet what is not known to be the same for them", node)
        return super().bring(build, node, layout, stages, target, merge)

    def are_alike(self, keys: Sequence[Hashable]) -> bool:
        """Whether equal tokens have equal ``keys``, one for each token."""
        return all(keys[place] == keys[label] for place, label in enumerate(self.labels))
