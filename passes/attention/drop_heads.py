"""Dormant heads dropped: what such heads give is left out, with their part of the projections.

A head whose output is small beside those of its layer does little (Sandoval-Segura et al., arXiv:2504.03889). The
result is exactly the model without these heads: rows of the query's weight, columns of the output's, and rows of the
key's and value's where no query reads them any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.mask import names_heads, parse
from regraft.ir.nodes import Builder, arguments, is_call, is_tensor, rank, shape, size_equal
from regraft.ir.program import Program
from regraft.ir.weights import WeightOp
from regraft.passes.attention.errors import AttentionError
from regraft.passes.attention.lossy import attention_at, builder, log_fired, log_refused, take_place
from regraft.passes.base import Pass
from regraft.passes.canonicalize.cleanup import DropDeadCode
from regraft.passes.refused import Refused

aten = torch.ops.aten
_SWAPPED = [0, 2, 1, 3]


@dataclass(frozen=True)
class DropHeads(Pass):
    """Leave out heads of the attention at ``place``. Queries that share a key go together: ``heads`` holds whole
    groups. At least one head stays. Where a projection is not recognised, its heads are computed and not read."""

    place: int
    heads: tuple[int, ...]

    def run(self, program: Program, session: Session) -> int:
        site = attention_at(program, self.place)
        given = arguments(site)
        count, kv_count = shape(given["query"])[1], shape(given["key"])[1]
        gone = set(self.heads)
        if not gone:
            return 0
        if not gone <= set(range(count)) or len(gone) == count:
            raise AttentionError(
                f"heads {sorted(gone)} of attention {self.place} were to go; it has {count}, and one at least must stay"
            )
        groups = count // kv_count
        kept_kv = [g for g in range(kv_count) if not set(range(g * groups, (g + 1) * groups)) & gone]
        kept = [head for head in range(count) if head not in gone]
        if len(kept_kv) * groups != len(kept):
            raise AttentionError(
                f"heads {sorted(gone)} were to go, but {groups} queries share each key: give whole groups of them"
            )
        if session.fuel.empty:
            return 0
        if names_heads(parse(given["mask"])):
            log_refused(session, self, site, Refused("the mask differs from head to head", site))
            return 0
        self._rewrite(program, site, given, kept, kept_kv)
        new = attention_at(program, self.place)
        log_fired(session, self, new, f"{len(gone)} of {count} heads dropped: {', '.join(map(str, sorted(gone)))}")
        DropDeadCode().run(program, session)
        program.graph.lint()
        return 1

    def _rewrite(
        self, program: Program, site: fx.Node, given: dict[str, Any], kept: list[int], kept_kv: list[int]
    ) -> None:
        count = shape(site)[1]
        build = builder(program, site, site, self.name)
        cut = _Cut(program, build)
        query = cut.operand(given["query"], kept)
        key, value = (cut.operand(given[name], kept_kv) for name in ("key", "value"))
        tensors = [cut.broadcast(tensor, kept, count) for tensor in given["mask_tensors"]]
        bias = None if given["bias"] is None else cut.broadcast(given["bias"], kept, count)
        slopes, sinks = (None if given[n] is None else cut.select(given[n], 0, kept) for n in ("slopes", "sinks"))
        new = build.call(ops.attention, query, key, value, tensors, bias, slopes, sinks, **site.kwargs)
        out = _output(site)
        if out is not None and program.weight_name(arguments(out)["weight"]) is not None:
            self._shrink_output(program, out, new, kept)
            return
        zeros = build.call(aten.mul.Tensor, build.call(aten.slice.Tensor, new, 1, 0, 1), 0.0)
        padded = build.call(aten.cat.default, [new, zeros], 1)
        places = [kept.index(head) if head in kept else len(kept) for head in range(count)]
        take_place(program, site, cut.select(padded, 1, places))

    def _shrink_output(self, program: Program, out: fx.Node, new: fx.Node, kept: list[int]) -> None:
        build = builder(program, out, out, self.name)
        given = arguments(out)
        size = shape(new)[3]
        rows = build.call(aten.permute.default, new, _SWAPPED)
        joined = build.call(
            aten.reshape.default, rows, [build.size(rows, 0), build.size(rows, 1), len(kept) * size]
        )  # fmt: skip
        name = str(program.weight_name(given["weight"]))
        columns = [head * size + place for head in kept for place in range(size)]
        weight = program.derive_weight(f"{name}.heads", WeightOp("index", (name,), {"dim": 1, "indices": columns}))
        take_place(program, out, build.call(aten.linear.default, joined, weight, given["bias"]))


def _output(site: fx.Node) -> fx.Node | None:
    """The output projection that alone reads an attention, through nothing but the joining of heads; or None."""
    wanted = ((aten.permute.default, _SWAPPED), (aten.reshape.default, None), (aten.linear.default, None))
    node = site
    for target, order in wanted:
        users = list(node.users)
        if len(users) != 1 or not is_call(users[0], (target,)) or users[0].args[0] is not node:
            return None
        node = users[0]
        if order is not None and not _swaps(node):
            return None
        joined = rank(node) == 3 and size_equal(shape(node)[-1], shape(site)[1] * shape(site)[3])
        if target is aten.reshape.default and not joined:
            return None
    return node


def _swaps(node: fx.Node) -> bool:
    """Whether a permutation exchanges heads and tokens."""
    order: Any = node.args[1]
    return list(order) == _SWAPPED


@dataclass(frozen=True)
class _Cut:
    """Makes operands of fewer heads."""

    program: Program
    build: Builder

    def select(self, node: fx.Node, dim: int, places: list[int]) -> fx.Node:
        """Some places of a dim."""
        device = node.meta["val"].device
        index = self.program.add_constant("heads.kept", torch.tensor(places, dtype=torch.int64, device=device))
        return self.build.call(aten.index_select.default, node, dim, index)

    def broadcast(self, node: fx.Node, kept: list[int], count: int) -> fx.Node:
        """A mask or bias, cut where it differs from head to head."""
        if rank(node) < 3 or not size_equal(shape(node)[-3], count) or count == 1:
            return node
        return self.select(node, rank(node) - 3, kept)

    def operand(self, node: fx.Node, kept: list[int]) -> fx.Node:
        """``[batch, heads, length, size]`` with the heads ``kept``: its projection is cut where each step up to it
        treats heads alike."""
        if len(kept) == shape(node)[1]:
            return node
        return self._through(node, kept) or self.select(node, 1, kept)

    def _through(self, node: fx.Node, kept: list[int]) -> fx.Node | None:
        if is_call(node, (ops.rope,)) or is_call(node, (ops.rms_norm, aten.layer_norm.default)):
            others = [other for other in node.all_input_nodes if other is not node.args[0]]
            if any(rank(other) > 2 and not size_equal(shape(other)[-3], 1) for other in others if is_tensor(other)):
                return None
            inner = self._through(node.args[0], kept)  # type: ignore[arg-type]
            return None if inner is None else self.build.call(node.target, inner, *node.args[1:], **node.kwargs)  # type: ignore[arg-type]
        if is_call(node, (aten.permute.default,)) and _swaps(node):
            joined = node.args[0]
            if is_call(joined, (aten.reshape.default,)) and rank(joined) == 4 and rank(joined.args[0]) == 3:  # type: ignore[arg-type, union-attr]
                return self._projection(joined, kept)  # type: ignore[arg-type]
        return None

    def _projection(self, split: fx.Node, kept: list[int]) -> fx.Node | None:
        count, size = shape(split)[2:]
        source: Any = split.args[0]
        first = 0
        if is_call(source, (aten.slice.Tensor,)) and source.args[1] in (-1, 2) and len(source.args) == 4:
            source, first = source.args[0], source.args[2]
        if not is_call(source, (aten.linear.default,)) or not size_equal(shape(split.args[0])[-1], count * size):  # type: ignore[arg-type]
            return None
        given = arguments(source)
        rows = [first + head * size + place for head in kept for place in range(size)]
        parts: list[fx.Node | None] = []
        for operand in (given["weight"], given["bias"]):
            name = None if operand is None else self.program.weight_name(operand)
            if operand is not None and name is None:
                return None
            op = None if name is None else WeightOp("index", (name,), {"dim": 0, "indices": rows})
            parts.append(None if op is None else self.program.derive_weight(f"{name}.heads", op))
        product = self.build.call(aten.linear.default, given["input"], *parts)
        sizes = [self.build.size(product, 0), self.build.size(product, 1), len(kept), size]
        return self.build.call(
            aten.permute.default, self.build.call(aten.reshape.default, product, sizes), _SWAPPED
        )  # fmt: skip
