"""What a plan is made from at one site: the metric, the scores and which tokens are there, as nodes of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, fx

from regraft.ir import ops
from regraft.ir.mask import And, Not, Or, Predicate
from regraft.ir.mask.predicate import tensors_of
from regraft.ir.nodes import Builder, arguments, dtype, is_call
from regraft.ir.ops.token_scores import OF_VALUES
from regraft.ir.program import Program
from regraft.passes.tokens.layout import Batch, Layout, Span, batch_of, plain
from regraft.passes.tokens.legality import HIDDEN, causal, hiding_bias
from regraft.passes.tokens.masks import Reader, Side
from regraft.passes.tokens.methods import Method
from regraft.passes.tokens.padding import hidden_keys
from regraft.passes.tokens.rebuild import Rebuild
from regraft.passes.tokens.sites import Site

aten = torch.ops.aten
_RANDOM_WIDTH = 16


@dataclass
class Planner:
    """Writes the plans of one method. ``prefix`` and ``suffix`` tokens stay; ``seed`` is that of random baselines."""

    program: Program
    method: Method
    seed: int
    prefix: int
    suffix: int
    _running: tuple[fx.Node, int] | None = None

    def plan(self, rebuild: Rebuild, build: Builder, site: Site, x: fx.Node, remove: int) -> fx.Node:
        """A plan that removes ``remove`` tokens of ``x`` ``[batch, tokens, width]``, the residual stream at a site."""
        keep = self._keep(rebuild, build, site)
        return build.call(
            ops.plan_merge,
            self._metric(rebuild, build, site, x),
            self._scores(rebuild, build, site, keep),
            keep,
            remove=remove,
            matching=self.method.matching,
            prefix=self.prefix,
            suffix=self.suffix,
            causal=causal(site.attention),
            margin=self.method.margin,
        )

    def observe(self, rebuild: Rebuild, build: Builder, site: Site) -> None:
        """Let the scores of a site where no token goes count for those behind it."""
        self._scores(rebuild, build, site, self._keep(rebuild, build, site))

    def _metric(self, rebuild: Rebuild, build: Builder, site: Site, x: fx.Node) -> fx.Node:
        if self.method.metric == "stream":
            return x
        if self.method.metric == "random":
            return self._random(rebuild, build, (_RANDOM_WIDTH,))
        key = arguments(site.attention)["key"]
        content = _unrotated(rebuild, build, key) or rebuild.value(key)
        return build.call(aten.mean.dim, content, [-3])

    def _scores(self, rebuild: Rebuild, build: Builder, site: Site, keep: fx.Node | None) -> fx.Node | None:
        kind = self.method.score
        if not kind:
            return None
        if kind == "random":
            return self._random(rebuild, build, ())
        given = arguments(site.attention)
        query, key, value = (rebuild.value(given[name]) for name in ("query", "key", "value"))
        read = value if kind in OF_VALUES else None
        found = build.call(ops.token_scores, query, key, keep, read, scale=given["scale"], kind=kind)
        return self._mean_so_far(rebuild, build, site, found) if self.method.running else found

    def _mean_so_far(self, rebuild: Rebuild, build: Builder, site: Site, found: fx.Node) -> fx.Node:
        """Half the scores of this site, and half the mean of those before, read at the tokens that stay."""
        stage = rebuild.stages.last
        if self._running is not None:
            before, then = self._running
            layout: Layout = (_batch(rebuild, site), (Span(0, rebuild.stages.tokens),))
            before = rebuild.stages.bring(build, before, layout, (then, stage), layout, merge=False)
            total = build.call(aten.add.Tensor, before, found)
            found = build.call(aten.mul.Tensor, total, 0.5)
        self._running = found, stage
        return found

    def _random(self, rebuild: Rebuild, build: Builder, width: tuple[int, ...]) -> fx.Node:
        """The same random numbers for every sample, drawn once, so that a baseline is deterministic too."""
        stages = rebuild.stages
        generator = torch.Generator().manual_seed(self.seed * 1000 + stages.last)
        drawn: Tensor = torch.randn((1, stages.left(stages.last), *width), generator=generator)
        node = self.program.add_constant("tokens.random", drawn.to(stages.device))
        return build.call(aten.expand.default, node, [stages.batch, *drawn.shape[1:]])

    def _keep(self, rebuild: Rebuild, build: Builder, site: Site) -> fx.Node | None:
        """``[batch, tokens]``: true for tokens that are no padding."""
        said, bias = hidden_keys(site.attention), hiding_bias(self.program, site.attention)
        if not said and bias is None:
            return None
        stages = rebuild.stages
        stage = stages.last
        span = Span(0, stages.tokens)
        side = Side(span, stage, stages.tokens)
        layout = (_batch(rebuild, site), (), *plain([stages.tokens] * 2))
        reader = Reader(build, stages, arguments(site.attention)["mask_tensors"], layout, side, side)
        found = [self._told(build, reader, reader.read(part), stages.left(stage)) for part in said]
        if bias is not None:
            seen = build.call(aten.gt.Scalar, reader.matrix(bias), HIDDEN)
            found.append(build.call(aten.reshape.default, seen, [-1, stages.left(stage)]))
        present = reduce(lambda left, right: build.call(aten.logical_and.default, left, right), found)
        return build.call(aten.expand.default, present, [stages.batch, stages.left(stage)])

    def _told(self, build: Builder, reader: Reader, part: Predicate, tokens: int) -> fx.Node:
        """``[batch or 1, tokens]``: what a part of a mask that looks at keys alone says of each."""
        match part:
            case Not(operand):
                return build.call(aten.logical_not.default, self._told(build, reader, operand, tokens))
            case And(operands) | Or(operands):
                join = aten.logical_and.default if isinstance(part, And) else aten.logical_or.default
                told = [self._told(build, reader, operand, tokens) for operand in operands]
                return reduce(lambda left, right: build.call(join, left, right), told)
        (number,) = tensors_of(part)
        flat = build.call(aten.reshape.default, reader.tensors[number], [-1, tokens])
        return flat if dtype(flat) == torch.bool else build.call(aten.ne.Scalar, flat, 0)


def _batch(rebuild: Rebuild, site: Site) -> tuple[Batch, ...]:
    """The dim of a layout that holds the samples."""
    batch = batch_of(rebuild.walk.layouts[site.anchor])
    return () if batch is None else (batch,)


def _unrotated(rebuild: Rebuild, build: Builder, key: fx.Node) -> fx.Node | None:
    """Keys before their rotary embedding, because positions are no content; None where they have none."""
    if is_call(key, (ops.rope,)):
        return rebuild.value(arguments(key)["x"])
    if is_call(key, (aten.cat.default,)):  # a part is rotated: some features, or all but the first tokens
        parts = arguments(key)["tensors"]
        found = [_unrotated(rebuild, build, part) for part in parts]
        if not any(found):
            return None
        whole = [own or rebuild.value(part) for own, part in zip(found, parts, strict=True)]
        return build.call(aten.cat.default, whole, arguments(key)["dim"])
    if not is_call(key, (aten.permute.default, aten.to.dtype, aten.repeat_interleave.self_int)):
        return None
    inner = _unrotated(rebuild, build, key.all_input_nodes[0])
    return None if inner is None else build.call(key.target, inner, *key.args[1:], **key.kwargs)  # type: ignore[arg-type]
