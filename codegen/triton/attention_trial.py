"""Trying the candidates of an attention site on a device: each is compared with the definition before its time counts.

Operands are drawn at random in the site's sizes and in its order of memory. What a mask's tensors hold is not known
here: candidates are compared with some of it hidden, and timed with all of it visible, as a batch without padding is.
What is made of a mask (a dense one, a block mask) is made as often as in the program: once for the sites that share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.attention_masks import parsed
from regraft.codegen.cpu.context import Context, Lowered
from regraft.codegen.cpu.executable import Executable
from regraft.codegen.timing import best_in_turn
from regraft.codegen.triton.attention_candidates import Candidate, candidates, flex_left_out, lower_by
from regraft.codegen.triton.attention_site import Site, Sizes
from regraft.codegen.triton.mask_operands import MaskOperand, mask_operands
from regraft.codegen.triton.tuning_records import TuningRecord
from regraft.codegen.triton.workbench import Workbench
from regraft.ir.capture_error import first_line
from regraft.ir.exactness import REASSOCIATION_TOLERANCE
from regraft.ir.nodes import concrete, dtype, shape, tensor_value
from regraft.ir.program import Program
from regraft.ir.verify import relative_l2

_SECONDS = 0.1  # of measuring a site, compiling aside
_WARM_UPS = 2
_MOST_COMPARED = 1 << 25  # scores of the sample that is compared with the definition, which holds all of them
_MOST_COPIES = 4  # of a site in what is timed: enough to share what is made of its mask
_WORTH_COMPILING = 0.9  # FlexAttention is compiled by torch wherever it is loaded, which takes long
_BOTH_ROUND = 2.0  # the definition's output is rounded to the element type too
_SHOWN = 160
_DOCUMENTS = 3


def measured(site: Site, program: Program, bench: Workbench) -> TuningRecord:
    """The record of a site: all its candidates tried on the device."""
    tried = {candidate.name: candidate for candidate in candidates(site, bench.arch)}
    left_out = _compared(site, program, bench, tried)
    reason = flex_left_out(site)
    if reason is not None:
        left_out["flex"] = reason
    sizes, copies = Sizes.of(site.given), min(site.alike, _MOST_COPIES)
    sample = Sample.of(site, sizes, bench.device, hidden=False)
    runs: dict[str, Callable[[], Any]] = {}
    for name, candidate in tried.items():
        if name not in left_out:
            run = sample.runs(candidate, program, copies)
            reason = _fails(lambda run=run: [run() for _ in range(_WARM_UPS)])  # type: ignore[misc]
            if reason is None:
                runs[name] = run
            else:
                left_out[name] = reason
    best = best_in_turn(runs, lambda name: bench.seconds(name, runs[name]), _SECONDS)
    seconds = {name: taken / copies for name, taken in best.items()}
    chosen = _fastest(seconds)
    kernels = {name: taken for name, taken in seconds.items() if tried[name].choice == "kernel"}
    config = tried[min(kernels, key=kernels.__getitem__)].config if kernels else None
    choice = tried[chosen].choice if chosen is not None else "definition"
    return TuningRecord(site.key, bench.arch, choice, config, seconds, left_out, bench.name)


def _fastest(seconds: dict[str, float]) -> str | None:
    worth = {name: taken / _WORTH_COMPILING if name == "flex" else taken for name, taken in seconds.items()}
    return min(worth, key=worth.__getitem__) if worth else None


def _compared(site: Site, program: Program, bench: Workbench, tried: dict[str, Candidate]) -> dict[str, str]:
    """The candidates whose output is not that of the definition, and why.

    FlexAttention, which is compiled anew for each size, is compared in the site's own sizes with a candidate that gave
    the definition's output in smaller ones.
    """
    sizes = Sizes.of(site.given)
    sample = Sample.of(site, _smaller(sizes), bench.device, hidden=True)
    trusted = Candidate("definition", lower_by(site, "definition"))
    expected = sample.runs(trusted, program)()
    left_out = {}
    for name, candidate in tried.items():
        if candidate.choice == "flex" and trusted.choice != "definition":
            sample = Sample.of(site, sizes, bench.device, hidden=True)
            expected = sample.runs(trusted, program)()
        reason = _differs(sample.runs(candidate, program), expected)
        if reason is not None:
            left_out[name] = reason
        elif trusted.choice == "definition":
            trusted = candidate
    return left_out


def _differs(run: Callable[[], Any], expected: Tensor) -> str | None:
    """Why an output is not the expected one; None where it is."""
    tolerance = _BOTH_ROUND * REASSOCIATION_TOLERANCE[expected.dtype]
    drift = math.nan

    def compare() -> None:
        nonlocal drift
        drift = relative_l2(run(), expected)

    reason = _fails(compare)
    if reason is None and not drift <= tolerance:
        reason = f"its output is {drift:.1e} away from the definition's (tolerance {tolerance:.0e})"
    return reason


def _fails(run: Callable[[], Any]) -> str | None:
    """What a candidate says that cannot run; compilers and libraries raise what they like."""
    try:
        run()
    except Exception as error:
        return first_line(error)[:_SHOWN]
    return None


def _smaller(sizes: Sizes) -> Sizes:
    """Sizes of which the definition is affordable: two batches, and shorter lengths."""
    sizes = replace(sizes, batch=min(sizes.batch, 2))
    while sizes.batch * sizes.heads * sizes.queries * sizes.keys > _MOST_COMPARED and sizes.keys > 1:
        alike = sizes.queries == sizes.keys
        queries = (sizes.queries + 1) // 2 if alike or sizes.queries > sizes.keys else sizes.queries
        keys = (sizes.keys + 1) // 2 if alike or sizes.queries <= sizes.keys else sizes.keys
        sizes = replace(sizes, queries=queries, keys=keys)
    return sizes


@dataclass(frozen=True)
class Sample:
    """A site by itself: its arguments with inputs of their own in the place of tensors, and values of these."""

    given: dict[str, Any]
    values: dict[fx.Node, Tensor]

    @staticmethod
    def of(site: Site, sizes: Sizes, device: torch.device, hidden: bool) -> Sample:
        """A site in ``sizes``; ``hidden``: its mask's tensors hide some pairs."""
        make = torch.Generator(device).manual_seed(0)
        drawn = _Drawn(site.given, sizes, make, hidden)
        graph, values = fx.Graph(), {}
        given = dict(site.given)

        def placed(name: str, value: Tensor) -> fx.Node:
            node = graph.placeholder(name)
            node.meta["val"] = value
            values[node] = value
            return node

        for name in ("query", "key", "value", "bias", "slopes", "sinks"):
            if given.get(name) is not None:
                given[name] = placed(name, drawn.operand(name))
        masks = {mask.number: mask for mask in mask_operands([parsed(given["mask"])])}
        given["mask_tensors"] = [
            placed(f"mask_{number}", drawn.mask(masks.get(number), node))
            for number, node in enumerate(given["mask_tensors"])
        ]
        return Sample(given, values)

    def runs(self, candidate: Candidate, program: Program, copies: int = 1) -> Callable[[], Any]:
        """The site lowered by a candidate, ``copies`` times in a row, as a call; it gives the output of the last."""
        context = Context(torch.nn.Module(), fx.Graph(), program=program)
        for node in self.values:
            context.values[node] = Lowered(full=context.graph.placeholder(node.name))
        made = [candidate.lower(context, self.given) for _ in range(copies)]
        context.graph.output(tuple(made))
        executable, values = Executable(fx.GraphModule(context.root, context.graph), b""), list(self.values.values())
        return lambda: executable(*values)[-1]


@dataclass(frozen=True)
class _Drawn:
    """Random operands of a site."""

    given: dict[str, Any]
    sizes: Sizes
    make: torch.Generator
    hidden: bool

    def operand(self, name: str) -> Tensor:
        """Query, key and value in the order in which the site's lie in memory; what is added to scores in its shape."""
        node, sizes = self.given[name], self.sizes
        if name in ("slopes", "sinks"):
            return self._normal((sizes.heads,), (0,), dtype(node))
        if name == "bias":
            whole = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
            held = shape(node)
            kept = tuple(
                1 if isinstance(size, int) and size == 1 else full
                for size, full in zip(held, whole[4 - len(held) :], strict=True)
            )
            return self._normal(kept, tuple(range(len(kept))), dtype(node))
        heads, length = (sizes.heads, sizes.queries) if name == "query" else (sizes.kv_heads, sizes.keys)
        strides = [concrete(stride) for stride in tensor_value(node).stride()]
        order = tuple(sorted(range(4), key=lambda dim: (-strides[dim], dim)))
        return self._normal((sizes.batch, heads, length, concrete(shape(node)[3])), order, dtype(node))

    def mask(self, mask: MaskOperand | None, node: fx.Node) -> Tensor:
        """A tensor that the mask reads: present, of full length, of one document, or with some of it hidden."""
        sizes, kind = self.sizes, dtype(node)
        if mask is None:
            return torch.zeros(1, dtype=kind, device=self.make.device)
        rows = sizes.queries if "rows" in mask.reads and "keys" not in mask.reads else sizes.keys
        if "length" in mask.reads:
            shortest = (sizes.keys + 1) // 2 if self.hidden else sizes.keys
            return self._whole(shortest, sizes.keys + 1, (sizes.batch,), kind)
        if "bits" in mask.reads:
            words = (sizes.batch, sizes.queries, concrete(shape(node)[-1]))
            return self._whole(0, 1 << 62, words, kind) | 1 if self.hidden else self._whole(-1, 0, words, kind)
        if mask.compared:
            places = torch.arange(rows, device=self.make.device) * (_DOCUMENTS if self.hidden else 0) // max(rows, 1)
            return places.expand(sizes.batch, rows).to(kind).contiguous()
        if "pairs" in mask.reads:
            seen = self._whole(0, 4 if self.hidden else 1, (sizes.batch, 1, sizes.queries, sizes.keys), torch.int32)
            return (seen == 0 if not self.hidden else seen > 0).to(kind)
        present = self._whole(0, 4 if self.hidden else 1, (sizes.batch, rows), torch.int32)
        return (present == 0 if not self.hidden else present > 0).to(kind)

    def _normal(self, size: Sequence[int], order: Sequence[int], kind: torch.dtype) -> Tensor:
        drawn = torch.randn([size[dim] for dim in order], generator=self.make, device=self.make.device)
        return drawn.to(kind).permute([order.index(dim) for dim in range(len(order))])

    def _whole(self, low: int, high: int, size: Sequence[int], kind: torch.dtype) -> Tensor:
        return torch.randint(low, high, tuple(size), generator=self.make, device=self.make.device).to(kind)
