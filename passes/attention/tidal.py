"""TidalDecode (Yang et al., arXiv:2410.05076): a few layers choose the keys that the others attend to.

On a decode step (one query a sequence): the layers before ``first`` are dense; layer ``first`` is dense and selects;
the layers behind it attend to the selection alone; layer ``again`` is dense and selects anew. The selection is an edge
of the graph from one layer to the next ones, made anew in every step."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.nodes import Builder, arguments, shape, size_equal
from regraft.ir.program import Program
from regraft.passes.attention.errors import AttentionError
from regraft.passes.attention.lossy import attentions, builder, log_fired, log_refused, take_place
from regraft.passes.base import Pass
from regraft.passes.refused import Refused

aten = torch.ops.aten


@dataclass(frozen=True)
class TidalDecode(Pass):
    """Attend to ``count`` keys of each head behind layer ``first``, chosen there and again in layer ``again`` (None:
    once). Layers whose keys, mask or shape differ from those of the selection stay dense, and the log says why."""

    count: int
    first: int = 2
    again: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.first < 0 or (self.again is not None and self.again <= self.first):
            raise AttentionError(
                f"count={self.count}, first={self.first} and again={self.again} were given; give one key or more, and "
                "a layer of re-selection behind the first"
            )

    def run(self, program: Program, session: Session) -> int:
        sites = attentions(program)
        if not self.first < len(sites):
            raise AttentionError(f"layer {self.first} was to select; the program has {len(sites)}, numbered from 0")
        selection: tuple[fx.Node, tuple[fx.Node, fx.Node]] | None = None
        made = 0
        for place, site in enumerate(sites):
            if session.fuel.empty or place < self.first:
                continue
            try:
                if place in (self.first, self.again):
                    _check(site, self.count)
                    selection = site, self._select(program, site)
                elif selection is not None:
                    _check(site, self.count)
                    _check_like(site, selection[0])
                    new = self._gathered(program, site, *selection[1])
                    log_fired(session, self, new, f"attention {place} reads {self.count} keys")
                    made += 1
            except Refused as refused:
                log_refused(session, self, site, refused)
        program.graph.eliminate_dead_code()  # a selection that no layer reads
        program.graph.lint()
        return made

    def _select(self, program: Program, site: fx.Node) -> tuple[fx.Node, fx.Node]:
        given = arguments(site)
        build = builder(program, site, site, self.name)
        both = build.call(
            ops.select_keys, given["query"], given["key"], given["mask_tensors"],
            scale=given["scale"], mask=given["mask"], count=self.count,
        )  # fmt: skip
        index, seen = (build.call(operator.getitem, both, place) for place in (0, 1))
        return index, seen

    def _gathered(self, program: Program, site: fx.Node, index: fx.Node, seen: fx.Node) -> fx.Node:
        given = arguments(site)
        build = builder(program, site, site, self.name)
        key, value = (_gather(build, given[name], index) for name in ("key", "value"))
        visible = build.call(aten.unsqueeze.default, seen, 2)
        groups = shape(given["query"])[1] // shape(given["key"])[1]
        if groups > 1:
            visible = build.call(aten.repeat_interleave.self_int, visible, groups, 1)
        options = {name: given[name] for name in ("scale", "empty_rows", "softcap")}
        new = build.call(
            ops.attention, given["query"], key, value, [visible], None, None, given["sinks"], mask="dense(0)", **options
        )
        take_place(program, site, new)
        return new


def _gather(build: Builder, node: fx.Node, index: fx.Node) -> fx.Node:
    """The rows ``index`` ``[batch, heads, count]`` of ``[batch, heads, keys, size]``."""
    wide = build.call(aten.unsqueeze.default, index, -1)
    sizes = [-1, -1, -1, build.size(node, 3)]
    return build.call(aten.gather.default, node, 2, build.call(aten.expand.default, wide, sizes))


def _check(site: fx.Node, count: int) -> None:
    given = arguments(site)
    if not size_equal(shape(given["query"])[2], 1):
        raise Refused(f"{shape(given['query'])[2]} queries: no decode step", site)
    keys = shape(given["key"])[2]
    if isinstance(keys, int) and keys <= count:
        raise Refused(f"{keys} keys are no more than the {count} to select", site)
    if given["bias"] is not None or given["slopes"] is not None:
        raise Refused("scores have a bias, which differs from key to key", site)
    if given["mask_fill"] is not None and given["mask_fill"] > -1e4:
        raise Refused(f"masked scores are {given['mask_fill']:g}, and take weight", site)


def _check_like(site: fx.Node, selecting: fx.Node) -> None:
    given, wanted = arguments(site), arguments(selecting)
    sizes: list[Any] = [shape(of["key"])[:3] for of in (given, wanted)]
    if not all(size_equal(a, b) for a, b in zip(*sizes, strict=True)):
        raise Refused("its keys are others than those of the selecting layer", site)
    if given["mask"] != wanted["mask"] or list(given["mask_tensors"]) != list(wanted["mask_tensors"]):
        raise Refused("its mask is another than that of the selecting layer", site)
