"""Linear layers in bf16: the product in bf16 with fp32 accumulation, operands and result cast at its ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.exactness import Exactness
from regraft.ir.nodes import Builder, arguments, dtype, is_call, shape, user_line
from regraft.ir.program import Program
from regraft.ir.weights import WeightOp
from regraft.passes.applied import log_applied
from regraft.passes.base import Pass
from regraft.passes.budget.candidate import PRECISION, Candidate, NotOffered

aten = torch.ops.aten
_SMALLEST = 1 << 12  # numbers of a weight below which the casts cost more than the product


@dataclass(frozen=True)
class LowerPrecision(Pass):
    """Compute the linear layers of some fp32 weights in bf16. ``weights`` are names of the program; those that it does
    not have, or that are not fp32, are left alone."""

    weights: tuple[str, ...]

    def run(self, program: Program, session: Session) -> int:
        wanted, casts = set(self.weights), dict[fx.Node, fx.Node]()
        made = 0
        for node in list(program.graph.nodes):
            name = _weight(program, node)
            if name in wanted and not session.fuel.empty:
                _rewrite(program, node, casts)
                self._log(session, node, name)
                made += 1
        program.graph.lint()
        return made

    def _log(self, session: Session, node: fx.Node, weight: str | None) -> None:
        made = (f"{weight} in bf16",)
        log_applied(session, self.name, Exactness.LOSSY, (node.name,), made, node)


def _rewrite(program: Program, node: fx.Node, casts: dict[fx.Node, fx.Node]) -> None:
    def stamp() -> dict[str, object]:
        kept = {key: node.meta.get(key) for key in ("stack_trace", "nn_module_stack")}
        return {**kept, "provenance": (*node.meta.get("provenance", ()), f"lower-precision({node.name})")}

    build = Builder(program.graph, node, program.fake_mode, stamp)
    given = arguments(node)
    x = given["input"]
    if x not in casts:  # layers that read the same input can be merged only while they still do
        casts[x] = build.call(aten.to.dtype, x, torch.bfloat16)
    operands = [_cast_weight(program, given[name]) for name in ("weight", "bias")]
    product = build.call(aten.linear.default, casts[x], *operands)
    wide = build.call(aten.to.dtype, product, dtype(node))
    node.replace_all_uses_with(wide, propagate_meta=False)
    program.graph.erase_node(node)


def _cast_weight(program: Program, weight: fx.Node | None) -> fx.Node | None:
    if weight is None:
        return None
    name = program.weight_name(weight)
    assert name is not None
    return program.derive_weight(f"{name}.bf16", WeightOp("cast", (name,), {"dtype": "bfloat16"}))


def _weight(program: Program, node: fx.Node) -> str | None:
    """The weight of a linear layer that can be computed in bf16; None for any other node."""
    if not is_call(node, (aten.linear.default,)):
        return None
    given = arguments(node)
    if any(given[name] is not None and program.weight_name(given[name]) is None for name in ("weight", "bias")):
        return None
    wide = all(dtype(given[name]) == torch.float32 for name in ("input", "weight"))
    large = all(isinstance(size, int) for size in shape(given["weight"])) and (
        math.prod(shape(given["weight"])) >= _SMALLEST
    )
    return program.weight_name(given["weight"]) if wide and large else None


def bf16_is_native(target: str) -> bool:
    """Whether the processor multiplies in bf16 by itself; elsewhere PyTorch emulates it, which saves nothing."""
    if target != "cpu":
        return False
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    avx = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and (avx() or amx())


def offer_precision(program: Program, target: str) -> Iterator[Candidate | NotOffered]:
    """The linear layers between one attention and the next as one site each, where the processor has bf16."""
    if not bf16_is_native(target):
        yield NotOffered("bf16", "the processor does not multiply in bf16 by itself")
        return
    offered = False
    for number, nodes in enumerate(_groups(program.graph.nodes)):
        held = [(node, name) for node in nodes if (name := _weight(program, node)) is not None]
        if held:
            offered = True
            yield Candidate(
                site=f"linear layers {number} ({held[0][1]}…)" if len(held) > 1 else f"linear layer ({held[0][1]})",
                knob="bf16",
                rewrite=LowerPrecision(tuple(dict.fromkeys(name for _, name in held))),
                family="bf16",
                order=PRECISION,
                user_line=user_line(held[0][0]),
            )
    if not offered:
        yield NotOffered("bf16", f"no linear layer has an fp32 weight of {_SMALLEST} numbers or more")


def _groups(nodes: Iterable[fx.Node]) -> Iterator[list[fx.Node]]:
    group: list[fx.Node] = []
    for node in nodes:
        if node.target is ops.attention:
            yield group
            group = []
        else:
            group.append(node)
    yield group
