"""``compile(unpad=True)``: a padded batch is computed on the tokens that are there, where that is faster.

Both forms of the model are kept. Which one a call runs depends on the share of its tokens that are there; from which
share on packing does not pay is measured when the model is compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from regraft.build import Build, Executable, Toolchain, build
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.passes.pipeline import default_pipeline, recognising
from regraft.passes.tokens.padding import Padding
from regraft.passes.tokens.unpad import Unpad, padding_in
from regraft.reference import Reference

if TYPE_CHECKING:
    from regraft.options import Options

_ROUNDS = 5
_NEVER = "the padded model runs, for packing did not pay at any share of tokens that was measured"


@dataclass(frozen=True)
class Either:
    """Runs ``packed`` where at most ``threshold`` of the tokens are there, else ``padded``; ``fill`` tells the share
    from the inputs, which are the same for both."""

    padded: Executable
    packed: Executable
    fill: Callable[..., float]
    threshold: float

    @property
    def tuning(self) -> bytes:
        """The kernels that the padded form was built with."""
        return getattr(self.padded, "tuning", b"")

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        chosen = self.packed if self.fill(*inputs) <= self.threshold else self.padded
        return chosen(*inputs)


def unpadded(exact: Build, options: Options, reference: Reference) -> str:
    """Put a packed form beside ``exact`` where that pays; returns what was decided, and why. ``reference`` is the
    original's output on the example inputs."""
    started = time.perf_counter()
    told = _unpadded(exact, options, reference)
    exact.phases["unpadding"] = time.perf_counter() - started
    return told


def _unpadded(exact: Build, options: Options, reference: Reference) -> str:
    recognised = exact.before.copy()
    recognising().run(recognised, Session(verify="off"))
    padding = padding_in(recognised)
    fill = None if padding is None else _fill(recognised, padding)
    trial = Session(verify="off")
    if not Unpad().run(recognised, trial):
        reasons = [item.reason for item in trial.log.refusals]
        return f"the padded model runs: {reasons[0] if reasons else 'no attention has a padding mask'}"
    if fill is None:
        return "the padded model runs: which tokens are there is not told by the inputs alone"
    toolchain = Toolchain(pipeline=lambda name: default_pipeline(name, tokens=(Unpad(),)))
    made = build(exact.before.copy(), options.target, options.verify, toolchain, reference)
    if not made.accepted:
        return f"the padded model runs: {made.why_refused}"
    return _beside(exact, made, fill)


def _beside(exact: Build, made: Build, fill: Callable[..., float]) -> str:
    """Measure both forms on the example and on what it would be without padding, and join them."""
    program, padded, packed = exact.entry.program, exact.entry.executable, made.entry.executable
    share = fill(*program.example)
    times = _seconds({"padded": padded, "packed": packed}, program.example)
    if times["packed"] >= times["padded"]:
        return f"{_NEVER} ({_told(share, times)})"
    threshold = share
    full = _without_padding(program.example, fill)
    if full is not None:
        whole = _seconds({"padded": padded, "packed": packed}, full)
        threshold = _crossing(share, times, whole)
    exact.entry.executable = Either(padded, packed, fill, threshold)
    exact.log.applications += [entry for entry in made.log.applications if entry.rule == Unpad().name]
    exact.log.of(Unpad().name).fired += 1
    if made.drift is not None:
        exact.drift = max(exact.drift or 0.0, made.drift)
    return f"batches of which at most {threshold:.0%} is there run packed ({_told(share, times)})"


def _crossing(share: float, times: dict[str, float], whole: dict[str, float]) -> float:
    """The share of tokens at which both take as long: packed time is taken to grow in a straight line to a full
    batch's."""
    gain, loss = times["padded"] - times["packed"], whole["packed"] - whole["padded"]
    return 1.0 if loss <= 0 else share + (1 - share) * gain / (gain + loss)


def _told(share: float, times: dict[str, float]) -> str:
    return (
        f"{share:.0%} of the example is there: {times['packed'] * 1e3:.1f} ms packed, "
        f"{times['padded'] * 1e3:.1f} ms padded"
    )


def _seconds(calls: dict[str, Executable], inputs: Sequence[Any]) -> dict[str, float]:
    """Median seconds of each, called in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(_ROUNDS + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call(*inputs)
            if number:  # the first run of each is not counted
                found[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in found.items()}


def _without_padding(example: Sequence[Any], fill: Callable[..., float]) -> list[Any] | None:
    """The example with all tokens there; None where no one input says which are."""
    for place, value in enumerate(example):
        if not isinstance(value, Tensor) or value.is_floating_point() or value.dim() < 2:
            continue
        for alike in (torch.ones_like, torch.zeros_like):
            whole = [*example[:place], alike(value), *example[place + 1 :]]
            if fill(*whole) == 1.0:
                return whole
    return None


def _fill(program: Program, padding: Padding) -> Callable[..., float] | None:
    """The share of tokens that are there as a function of the flat inputs; None where more than inputs decides."""
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in program.user_inputs():
        made[node] = graph.placeholder(node.name)
    needed = _behind(padding.tensor)
    for node in program.graph.nodes:
        if node in needed and node not in made:
            if node.op != "call_function":
                return None
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(made[padding.tensor])
    run = fx.GraphModule(nn.Module(), graph).forward

    def share(*inputs: Any) -> float:
        with torch.no_grad():
            return float(((run(*inputs) != 0) != padding.inverted).float().mean())

    return share


def _behind(node: fx.Node) -> set[fx.Node]:
    """``node`` and all that it is computed from."""
    needed, pending = set[fx.Node](), [node]
    while pending:
        current = pending.pop()
        if current not in needed:
            needed.add(current)
            pending += current.all_input_nodes
    return needed
