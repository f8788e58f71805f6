"""Putting the kernels that look at attention's scores alone into a program's graph: log-sum-exp and largest score of
rows, column sums and the token scores that are read off them, the highest keys and the selections made of them."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.triton.attention_columns import emit_columns
from regraft.codegen.triton.attention_rows import emit_rows
from regraft.codegen.triton.attention_spec import AttentionSpec, Unsupported, site_spec
from regraft.codegen.triton.attention_topk import MOST_SHARED, TopkSpec, emit_topk
from regraft.codegen.triton.emit import Kernel, Origin
from regraft.codegen.triton.rowwise.lower import RegionReport
from regraft.codegen.triton.sites import Sites
from regraft.ir import ops
from regraft.ir.nodes import arguments, concrete, rank, shape
from regraft.ir.ops.select_keys import in_rising_order
from regraft.ir.ops.token_scores import PRESENT, mean_received
from regraft.ir.program import Program


def lower_scores(program: Program, report: RegionReport) -> None:
    """Replace what reads scores by kernels, in place; what has none runs its definition, and the report says why."""
    for target, lowering in _LOWERINGS.items():
        nodes = [node for node in program.graph.nodes if node.target is target]
        lowering(program, report).run([node for node in nodes if lowering.takes(node)])


class _Scores(Sites):
    """Sites of an operator that takes an attention's operands but for the values."""

    rule = "score kernel"

    @staticmethod
    def takes(node: fx.Node) -> bool:
        """Whether a node is such a site."""
        return True

    def given(self, node: fx.Node) -> dict[str, Any]:
        """The arguments of a site, in the names of attention's."""
        return arguments(node)

    def scores(self, node: fx.Node) -> AttentionSpec:
        """What its scores are made of."""
        given = self.given(node)
        try:
            return site_spec({**given, "value": given["key"]})
        except Unsupported as refusal:
            raise Unfusable(f"{node.name}: {refusal}; the definition runs") from refusal

    def place(self, node: fx.Node, kernel: Kernel) -> None:
        self.replace(node, self.call(node, kernel, self.operands(node, kernel), node.meta["val"]))

    def operands(self, node: fx.Node, kernel: Kernel) -> tuple[Any, ...]:
        """What the kernel's operator is called with."""
        given = self.given(node)
        masks = {f"mask_{number}": tensor for number, tensor in enumerate(given["mask_tensors"])}
        found = [masks[name] if name in masks else given[name] for name in kernel.operands]
        return tuple(value if isinstance(value, fx.Node) else float(value) for value in found)

    def after(self, node: fx.Node, function: Any, *args: Any) -> None:
        """Let ``function`` of what was just placed take the place of a site."""
        with self.program.graph.inserting_before(node):
            made = self.program.graph.call_function(function, args)
        made.meta = {**node.meta}
        self.replace(node, made)


class _Rows(_Scores):
    gain = "no scores in memory"
    gives = "lse"

    def key(self, node: fx.Node) -> AttentionSpec:
        fill = arguments(node)["mask_fill"]
        spec = self.scores(node)
        # Beside other keys such a number may weigh nothing, but it is the largest score of a row that sees none.
        return replace(spec, mask_fill=None if fill in (None, float("-inf")) else float(fill), empty_rows="nan")

    def emit(self, key: AttentionSpec, node: fx.Node, origins: tuple[Origin, ...]) -> Kernel:
        return emit_rows(key, self.gives, origins)


class _Largest(_Rows):
    gives = "largest"


class _Columns(_Scores):
    gain = "two passes in linear memory, the second with query and key exchanged"

    def key(self, node: fx.Node) -> AttentionSpec:
        return self.scores(node)

    def emit(self, key: AttentionSpec, node: fx.Node, origins: tuple[Origin, ...]) -> Kernel:
        return emit_columns(key, origins)


class _Received(_Columns):
    """Token scores by the attention that a token receives."""

    @staticmethod
    def takes(node: fx.Node) -> bool:
        return bool(arguments(node)["kind"] == "received")

    def given(self, node: fx.Node) -> dict[str, Any]:
        given = arguments(node)
        keep = given["keep"]
        if keep is not None and rank(keep) != 2:
            raise Unfusable(f"{node.name}: keep is {list(shape(keep))}; the definition runs")
        mask: dict[str, Any] = {"mask": "all", "mask_tensors": []}
        if keep is not None:
            mask = {"mask": PRESENT, "mask_tensors": [keep]}
        return {**given, **mask, "bias": None, "slopes": None, "softcap": 0.0, "empty_rows": "zero"}

    def place(self, node: fx.Node, kernel: Kernel) -> None:
        given = self.given(node)
        sizes = (*shape(given["query"])[:2], shape(given["key"])[2])
        value = node.meta["val"].new_empty(sizes, dtype=torch.float32)
        sums = self.call(node, kernel, self.operands(node, kernel), value)
        self.after(node, mean_received, sums, given["keep"])


class _Highest(_Scores):
    gain = "the highest keys in one pass, no scores in memory"

    def key(self, node: fx.Node) -> TopkSpec:
        given = self.given(node)
        group = concrete(shape(given["query"])[1]) // max(1, concrete(shape(given["key"])[1]))
        if given["shared"] and group > MOST_SHARED:
            raise Unfusable(
                f"{node.name}: {group} heads choose together, and kernels take {MOST_SHARED}; the definition runs"
            )
        spec = TopkSpec(replace(self.scores(node), empty_rows="nan"), given["count"], given["shared"])
        reason = spec.refused()
        if reason is not None:
            raise Unfusable(f"{node.name}: {reason}; the definition runs")
        return spec

    def emit(self, key: TopkSpec, node: fx.Node, origins: tuple[Origin, ...]) -> Kernel:
        return emit_topk(key, origins)


class _Selections(_Highest):
    """The selection of TidalDecode: heads that share keys choose together, and places come in rising order."""

    def given(self, node: fx.Node) -> dict[str, Any]:
        return {**arguments(node), "shared": True, "bias": None, "slopes": None, "softcap": 0.0}

    def place(self, node: fx.Node, kernel: Kernel) -> None:
        given = self.given(node)
        index = node.meta["val"][0][:, :, None]
        value = index.new_empty(index.shape, dtype=torch.float32), index
        both = self.call(node, kernel, self.operands(node, kernel), value)
        with self.program.graph.inserting_before(node):
            places = self.program.graph.call_function(operator.getitem, (both, 1))
            keys = self.program.graph.call_function(torch.ops.aten.sym_size.int, (given["key"], 2))
        places.meta, keys.meta = {**node.meta, "val": index}, {**node.meta, "val": shape(given["key"])[2]}
        self.after(node, in_rising_order, places, keys)


_LOWERINGS: dict[Any, type[_Scores]] = {
    ops.attention_lse: _Rows,
    ops.attention_max: _Largest,
    ops.attention_column_sums: _Columns,
    ops.token_scores: _Received,
    ops.attention_topk: _Highest,
    ops.select_keys: _Selections,
}
