"""Recording which experts a model's tokens choose, from its graph: what its routers decide is computed, the experts of
the last expert layer and all that follows are not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from regraft.errors import OptionError
from regraft.ir import ops
from regraft.ir.driver import Session
from regraft.ir.nodes import arguments, shape
from regraft.ir.program import Program
from regraft.passes.pipeline import default_pipeline
from regraft.solvers.placement.trace import Batch, Trace

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class Recorder:
    """A captured model that returns its routing: ``[layers, tokens, top_k]`` for each call.

    ``program`` was captured on the token ids ``ids`` ``[batch, length]``, and is rewritten in place. Raises
    ``OptionError`` where it holds no expert block that is recognised, or blocks of several sizes, which no plan is for.
    """

    def __init__(self, program: Program, ids: Tensor) -> None:
        self._place = _place_of(ids, program)
        self._example = list(program.example)
        default_pipeline("cpu").run(program, Session())
        sites = [node for node in program.graph.nodes if node.target is ops.moe]
        if not sites:
            raise OptionError(
                "the model has no block of routed experts that is recognised; `regraft explain` says what was refused"
            )
        self.num_experts = _only("experts", [_num_experts(node) for node in sites])
        self.top_k = _only("choices a token", [int(shape(arguments(node)["index"])[1]) for node in sites])
        self.layer_ids = _layer_ids(sites)
        self._run = _routing(program, [arguments(node)["index"] for node in sites])

    def batch(self, ids: Tensor, phase: str = "prefill", scenario: str = "all") -> Batch:
        """The choices of one call's tokens; ``ids`` are ``[batch, length]`` as in the capture."""
        inputs = [ids if place == self._place else value for place, value in enumerate(self._example)]
        with torch.no_grad():
            chosen = [index.reshape(-1, self.top_k).to(torch.int64) for index in self._run(*inputs)]
        experts = torch.stack(chosen).numpy()
        outside = (experts < 0) | (experts >= self.num_experts)  # a pair that the operator leaves out
        return Batch.of_tokens(np.where(outside, -1, experts), self.num_experts, phase=phase, scenario=scenario)

    def trace(self, batches: Iterable[Batch], num_hidden_layers: int = 0, model_name: str = "") -> Trace:
        """The batches as a trace of this model."""
        return Trace(self.num_experts, self.top_k, self.layer_ids, tuple(batches), num_hidden_layers, model_name)


def windows(tokens: Sequence[int], batch: int, length: int) -> Iterator[Tensor]:
    """Token ids cut into calls of ``[batch, length]``; what is left over at the end is not used. Raises
    ``OptionError`` where there are too few for one."""
    size = batch * length
    if len(tokens) < size:
        raise OptionError(
            f"the texts give {len(tokens)} tokens, and one call takes {batch} x {length}; give more text, or a smaller "
            "--length or --batch"
        )
    for start in range(0, len(tokens) - size + 1, size):
        yield torch.tensor(tokens[start : start + size], dtype=torch.int64).view(batch, length)


def _place_of(ids: Tensor, program: Program) -> int:
    held = [place for place, value in enumerate(program.example) if isinstance(value, Tensor) and _same(value, ids)]
    if len(held) != 1:
        raise OptionError("the token ids are not among the model's inputs as they were given; record from the model")
    return held[0]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _num_experts(node: fx.Node) -> int:
    return int(shape(arguments(node)["first"])[0])


def _only(what: str, found: list[int]) -> int:
    if len(set(found)) > 1:
        raise OptionError(
            f"the model's expert blocks have {', '.join(map(str, sorted(set(found))))} {what}; a trace is of one number"
        )
    return found[0]


def _layer_ids(sites: Sequence[fx.Node]) -> tuple[int, ...]:
    """The place of each block among the model's layers, from the path of the module that it was captured in; their
    order where the paths do not tell them apart."""
    found = [_layer_id(node) for node in sites]
    known = [number for number in found if number is not None]
    if len(known) == len(sites) and known == sorted(set(known)):
        return tuple(known)
    return tuple(range(len(sites)))


def _layer_id(node: fx.Node) -> int | None:
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    numbers = _NUMBER.findall(paths[-1]) if paths else []
    return int(numbers[0]) if numbers else None


def _routing(program: Program, indices: list[fx.Node]) -> Any:
    program.output_node.args = (tuple(indices),)
    program.graph.eliminate_dead_code()
    return program.callable()
