"""Checking one rewrite before it takes effect: shapes, element types, and numbers on probe inputs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from regraft.ir.exactness import REASSOCIATION_TOLERANCE, Exactness
from regraft.ir.memory import give_back
from regraft.ir.nodes import concrete, is_tensor, shape, sizes_equal
from regraft.ir.probe import Pool, Probe, ProbeError, Sample, is_size, vary_inputs
from regraft.ir.program import Program
from regraft.ir.repeats import Signature, Unrepeatable

_WORTH_GIVING_BACK = 1 << 22  # elements of a checked value
_CLOSE_ENOUGH_TO_ORIGINAL = 2.0  # a rewrite may be this much further from fp64 than what it replaces


@dataclass(frozen=True)
class Verdict:
    """Whether a rewrite may stand, why not, and the drift that was measured. ``repeated``: measured on an earlier
    rewrite that is the same computation, other parameters aside."""

    accepted: bool
    reason: str = ""
    drift: float | None = None
    drift_fp64: float | None = None
    original_fp64: float | None = None
    repeated: bool = False


@dataclass
class Checked:
    """Verdicts by what was computed for them. Not ``reused``, every check is computed, and on whole batches."""

    reused: bool = True
    verdicts: dict[Hashable, Verdict] = field(default_factory=dict)
    repetitions: int = 0

    def known(self, signature: Hashable) -> Verdict | None:
        """The verdict on the same computation, if there is one that accepts."""
        found = self.verdicts.get(signature) if self.reused else None
        if found is None:
            return None
        self.repetitions += 1
        return replace(found, repeated=True)


def relative_l2(value: Tensor, reference: Tensor) -> float:
    """``||value - reference|| / ||reference||`` in fp64; infinite where one is not finite and the other differs."""
    if value.shape != reference.shape:
        return float("inf")
    if (
        value.dtype == reference.dtype
        and value.data_ptr() == reference.data_ptr()
        and (value.stride(), value.is_conj(), value.is_neg())
        == (reference.stride(), reference.is_conj(), reference.is_neg())
    ):
        return 0.0
    if torch.equal(value, reference):
        return 0.0
    if value.is_complex() and reference.is_complex():
        return relative_l2(*(torch.view_as_real(part.resolve_conj()) for part in (value, reference)))
    if not (value.is_floating_point() and reference.is_floating_point()):
        return 0.0 if torch.equal(value.to(torch.float64), reference.to(torch.float64)) else float("inf")
    squares = norm = 0.0
    flat = value.detach().reshape(-1), reference.detach().reshape(-1)
    for start in range(0, flat[0].numel(), _AT_ONCE):  # in fp64 all of it would be the largest thing in memory
        left, right = (part[start : start + _AT_ONCE].double() for part in flat)
        odd = ~(torch.isfinite(left) & torch.isfinite(right))
        if bool(odd.any()):
            agree = torch.isnan(left) & torch.isnan(right) | (left == right)
            if not bool(agree[odd].all()):
                return float("inf")
            left, right = left.masked_fill(odd, 0.0), right.masked_fill(odd, 0.0)
        squares += float((left - right).square_().sum())
        norm += float(right.square().sum())
    return math.sqrt(squares / norm) if norm > 0 else math.sqrt(squares)


_AT_ONCE = 1 << 14


def check_shapes(old: fx.Node, new: fx.Node) -> str:
    """Empty when ``new`` has the shape and element type of ``old``, else what differs."""
    if is_tensor(old) != is_tensor(new):
        return f"{new.name} does not stand for the same kind of value as {old.name}"
    if not is_tensor(old):
        return ""
    was, now = old.meta["val"], new.meta["val"]
    if was.dtype != now.dtype:
        return f"element type changes from {was.dtype} to {now.dtype}"
    if not sizes_equal(was.shape, now.shape):
        return f"shape changes from {list(was.shape)} to {list(now.shape)}"
    return ""


class Verifier:
    """Checks replacements of one program on its example inputs and on a variation of them.

    Cost is that of the rewritten nodes alone, once for all that are the same computation. ``against_fp64`` also
    measures old and new against an fp64 run.
    """

    def __init__(self, program: Program, checked: Checked | None = None, seed: int = 0) -> None:
        self.program = program
        self.checked = checked if checked is not None else Checked()
        self.pool = Pool(seed)
        self.inputs = [program.example]
        varied = vary_inputs(program.example, seed)
        if any(_differs(a, b) for a, b in zip(varied, program.example, strict=True)):
            self.inputs.append(varied)

    def check(
        self, pairs: dict[fx.Node, fx.Node], made: list[fx.Node], exactness: Exactness, against_fp64: bool = False
    ) -> Verdict:
        """Compare each old node with the new one that is to take its place."""
        for old, new in pairs.items():
            reason = check_shapes(old, new)
            if reason:
                return Verdict(False, reason)
        pairs = {old: new for old, new in pairs.items() if is_tensor(old)}
        frontier = _frontier(pairs, made)
        worst = Verdict(True, drift=0.0)
        for inputs in self.inputs[: 2 if self._reads_inputs(frontier, pairs) else 1]:
            try:
                verdict = self._compare(pairs, frontier, inputs, exactness, against_fp64)
            except ProbeError as error:
                return Verdict(False, f"could not be checked: {error}")
            if not verdict.accepted:
                return verdict
            worst = max(verdict, worst, key=lambda v: v.drift or 0.0)
        if any(math.prod(n for n in shape(old) if isinstance(n, int)) >= _WORTH_GIVING_BACK for old in pairs):
            give_back()
        return worst

    def _compare(
        self,
        pairs: dict[fx.Node, fx.Node],
        frontier: list[fx.Node],
        inputs: list[Any],
        exactness: Exactness,
        against_fp64: bool,
    ) -> Verdict:
        probe = Probe(self.program, frontier, self.pool, inputs)
        wanted = [*pairs, *pairs.values()]
        signature = self._signature(probe, wanted, (inputs is self.program.example, exactness, against_fp64))
        verdict = self.checked.known(signature)
        if verdict is None:
            verdict = self._judge_sample(pairs, probe, frontier, inputs, exactness, against_fp64)
            if verdict is None:
                values = probe.evaluate(wanted)
                verdict = self._judge(pairs, frontier, inputs, values, exactness, against_fp64)
            if verdict.accepted:
                self.checked.verdicts[signature] = verdict
        return verdict

    def _judge_sample(
        self,
        pairs: dict[fx.Node, fx.Node],
        whole: Probe,
        frontier: list[fx.Node],
        inputs: list[Any],
        exactness: Exactness,
        against_fp64: bool,
    ) -> Verdict | None:
        """The verdict on a part of a large batch, if it accepts. None where there is no such part, where the nodes are
        for the whole batch only, and where the rewrite is off on it: the whole then decides."""
        sample = whole.worthwhile_sample() if self.checked.reused else None
        if sample is None:
            return None
        probe = Probe(self.program, frontier, self.pool, inputs, sample=sample)
        try:
            values = probe.evaluate([*pairs, *pairs.values()])
            sizes = [sample.size([concrete(extent) for extent in shape(old)]) for old in pairs]
            if [list(value.shape) for value in values] != [*sizes, *sizes]:
                return None
            verdict = self._judge(pairs, frontier, inputs, values, exactness, against_fp64, sample)
        except ProbeError:
            return None
        return verdict if verdict.accepted else None

    def _signature(self, probe: Probe, wanted: list[fx.Node], asked: Hashable) -> Hashable:
        """What the check computes; a value of its own where that cannot be told."""
        try:
            return asked, Signature(self.program, probe.leaf).of(probe.order(wanted), wanted)
        except Unrepeatable:
            return object()

    def _judge(
        self,
        pairs: dict[fx.Node, fx.Node],
        frontier: list[fx.Node],
        inputs: list[Any],
        values: list[Any],
        exactness: Exactness,
        against_fp64: bool,
        sample: Sample | None = None,
    ) -> Verdict:
        old, new = values[: len(pairs)], values[len(pairs) :]
        drift = max((relative_l2(b, a) for a, b in zip(old, new, strict=True)), default=0.0)
        tolerance = 0.0 if exactness is Exactness.BITWISE else _tolerance(old)
        if exactness is Exactness.LOSSY:
            return Verdict(True, drift=drift)
        if drift <= tolerance and not against_fp64:
            return Verdict(True, drift=drift)
        if exactness is Exactness.BITWISE:
            return Verdict(False, f"declared bitwise, but changes the result by {drift:.1e}", drift)
        wide = Probe(self.program, frontier, self.pool, inputs, double=True, sample=sample).evaluate(pairs)
        new_error = max(relative_l2(b, exact) for b, exact in zip(new, wide, strict=True))
        old_error = max(relative_l2(a, exact) for a, exact in zip(old, wide, strict=True))
        accepted = new_error <= max(tolerance, _CLOSE_ENOUGH_TO_ORIGINAL * old_error)
        reason = "" if accepted else f"relative L2 error {new_error:.1e} against fp64, the original has {old_error:.1e}"
        return Verdict(accepted, reason, drift, new_error, old_error)

    def _reads_inputs(self, frontier: list[fx.Node], pairs: dict[fx.Node, fx.Node]) -> bool:
        """Whether the integer inputs of the program can reach the rewrite without passing an activation."""
        stop = set(frontier)
        pending, seen = list(pairs) + frontier, set[fx.Node]()
        users = set(self.program.user_inputs())
        while pending and len(seen) < 4000:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in users:
                return True
            if node not in stop or not _is_activation(node):
                pending += node.all_input_nodes
        return False


def _frontier(pairs: dict[fx.Node, fx.Node], made: list[fx.Node]) -> list[fx.Node]:
    """What the new nodes read. Of a tensor whose size alone is read, no value is wanted: it may be interior. Nor is
    any value wanted of what a rule built and then went past: an operand of that may be interior too."""
    inside = set(made)
    readers = [node for node in _live(pairs.values(), inside) if not is_size(node)]
    outer = {source for node in readers for source in node.all_input_nodes if source not in inside}
    outer |= {new for new in pairs.values() if new not in inside}
    return sorted(outer)


def _live(results: Iterable[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """The nodes of ``inside`` that the results are computed from."""
    pending, live = [node for node in results if node in inside], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending += [source for source in node.all_input_nodes if source in inside]
    return live


def _is_activation(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].is_floating_point() and node.op != "placeholder"


def _tolerance(values: list[Any]) -> float:
    return max((REASSOCIATION_TOLERANCE.get(v.dtype, 0.0) for v in values if isinstance(v, Tensor)), default=0.0)


def _differs(left: Any, right: Any) -> bool:
    return isinstance(left, Tensor) and isinstance(right, Tensor) and not torch.equal(left, right)
