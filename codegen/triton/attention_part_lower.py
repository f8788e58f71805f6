"""Putting kernels in the place of attention over a part of the keys, and of the merge of such parts.

The kernels are attention's own, with their log-sum-exp, and the output in fp32: mask and bias are cut to the part
before, what the part adds to all scores of a row and the sink join the log-sum-exp behind.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.triton.attention_merge import MergeSpec, emit_merge
from regraft.codegen.triton.attention_part_mask import PartMask
from regraft.codegen.triton.attention_site import emit_attention, is_decode
from regraft.codegen.triton.attention_spec import AttentionSpec, Unsupported, site_spec
from regraft.codegen.triton.emit import Kernel, Origin
from regraft.codegen.triton.rowwise.lower import RegionReport
from regraft.codegen.triton.sites import Sites
from regraft.ir import ops
from regraft.ir.mask import parse
from regraft.ir.nodes import Builder, arguments, dtype, rank, shape
from regraft.ir.program import Program

aten = torch.ops.aten


def lower_parts(program: Program, report: RegionReport) -> None:
    """Replace parts of attention and their merges by kernels, in place; what has none runs its definition, and the
    report says why."""
    for target, lowering in ((ops.attention_part, _Parts), (ops.attention_merge, _Merges)):
        lowering(program, report).run([node for node in program.graph.nodes if node.target is target])


@dataclass(frozen=True)
class _Part:
    """What the text of a part's kernel depends on."""

    spec: AttentionSpec
    decode: bool


class _Parts(Sites):
    rule = "attention kernel"
    gain = "a part of the keys with its log-sum-exp, no scores in memory"

    def key(self, node: fx.Node) -> _Part:
        given, mask = self.given(node)
        fill, shifted = given["mask_fill"], given["slopes"] is not None and given["first"] != 0
        try:
            predicate = mask.of(parse(given["mask"]))
            if shifted and (fill is not None or given["sinks"] is not None):
                raise Unsupported("slopes shift all scores of a part but those of its sinks or masked keys")
            spec = site_spec({**given, "mask": str(predicate), "mask_fill": None, "empty_rows": "zero"}, lse=True)
        except Unsupported as refusal:
            raise Unfusable(f"{node.name}: {refusal}; the definition runs") from refusal
        spec = replace(spec, mask_fill=None if fill in (None, float("-inf")) else float(fill), wide=True)
        return _Part(spec, is_decode(given, spec))

    def given(self, node: fx.Node) -> tuple[dict[str, Any], PartMask]:
        """The arguments of a site, and what cuts its mask."""
        given = arguments(node)
        return given, PartMask(given["first"], given["keys"])

    def emit(self, key: _Part, node: fx.Node, origins: tuple[Origin, ...]) -> Kernel:
        return emit_attention(key.spec, key.decode, origins)

    def place(self, node: fx.Node, kernel: Kernel) -> None:
        given, mask = self.given(node)
        mask.of(parse(given["mask"]))
        build = Builder(self.program.graph, node, self.program.fake_mode)
        first, last = given["first"], given["first"] + shape(given["key"])[2]
        cut = {f"mask_{place}": _cut(build, given["mask_tensors"][number], how, first, last)
               for place, (number, how) in enumerate(mask.tensors)}  # fmt: skip
        if given["bias"] is not None:
            given["bias"] = _cut(build, given["bias"], "pairs", first, last)
        operands = [cut[name] if name in cut else given[name] for name in kernel.operands]
        value: Tensor = node.meta["val"]
        both = self.call(
            node, kernel, tuple(x if isinstance(x, fx.Node) else float(x) for x in operands),
            (value[..., :-1], value[..., -1]),
        )  # fmt: skip
        slopes = given["slopes"] if first else None
        out, lse = (build.call(operator.getitem, both, place) for place in (0, 1))
        self.replace(node, build.call(joined, out, lse, given["sinks"], slopes, first))


def _cut(build: Builder, tensor: fx.Node, how: str, first: int, last: int) -> fx.Node:
    """A tensor of all keys, for the keys of a part."""
    if how == "length":
        return build.call(aten.sub.Tensor, tensor, first)
    if how == "whole" or rank(tensor) == 0 or (how == "pairs" and shape(tensor)[-1] == 1):
        return tensor
    return build.call(aten.slice.Tensor, tensor, rank(tensor) - 1, first, last)


def joined(out: Tensor, lse: Tensor, sinks: Tensor | None, slopes: Tensor | None, first: int) -> Tensor:
    """A part as ``regraft::attention_part`` gives it, from a kernel's output and log-sum-exp: with the sinks, and with
    what slopes add to scores because its keys begin at ``first``."""
    if slopes is not None:
        lse = lse + (slopes.float() * first).reshape(1, -1, 1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().reshape(1, -1, 1))
    return torch.cat([out, lse.unsqueeze(-1)], -1)


class _Merges(Sites):
    rule = "attention kernel"
    gain = "parts merged in one pass"

    def key(self, node: fx.Node) -> MergeSpec:
        given = arguments(node)
        width = shape(given["parts"])[-1]
        if rank(given["parts"]) != 5 or not isinstance(width, int):
            raise Unfusable(f"{node.name}: parts are {list(shape(given['parts']))}; the definition runs")
        spec = MergeSpec(dtype(given["parts"]), width - 1, empty_rows=given["empty_rows"])
        reason = spec.refused() or ("" if spec.dtype == torch.float32 else "log-sum-exps are no fp32")
        if reason:
            raise Unfusable(f"{node.name}: {reason}; the definition runs")
        return spec

    def emit(self, key: MergeSpec, node: fx.Node, origins: tuple[Origin, ...]) -> Kernel:
        return emit_merge(key, origins)

    def place(self, node: fx.Node, kernel: Kernel) -> None:
        given = arguments(node)
        build = Builder(self.program.graph, node, self.program.fake_mode)
        parts = given["parts"]
        outs = build.call(aten.slice.Tensor, parts, 4, 0, shape(parts)[4] - 1)
        lse = build.call(aten.select.int, parts, 4, shape(parts)[4] - 1)
        wide: Tensor = node.meta["val"].float()
        both = self.call(node, kernel, (outs, lse), (wide, wide[..., 0]))
        merged = build.call(operator.getitem, both, 0)
        self.replace(node, build.call(aten.to.dtype, merged, given["dtype"]))
