"""Probe values: evaluating a few nodes of a program without running the whole of it.

A rewrite is checked on the nodes that it reads. Activations among them get random values, drawn as views of one pool
so that drawing costs nothing; weights are the real ones; index arithmetic (masks, positions) is evaluated from the
program's inputs, because rewrites prove facts about it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from regraft.ir.nodes import concrete, is_tensor, is_view, shape
from regraft.ir.program import Program

_CONE_LIMIT = 4000
_ENOUGH = 1 << 18  # random numbers in the largest value: a check on more takes longer, and tells nothing else
_LOW_TO_HIGH = (torch.float16, torch.bfloat16, torch.float32)


class ProbeError(RuntimeError):
    """A node could not be evaluated on probe inputs."""


class Pool:
    """Standard normal numbers, drawn once; each request is a view at its own offset."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._values = torch.randn(1 << 16, generator=self._generator, dtype=torch.float32)

    def take(self, size: list[int], dtype: torch.dtype, offset: int) -> Tensor:
        """A tensor of ``size``; equal arguments give equal values."""
        count = 1
        for extent in size:
            count *= extent
        shift = 16 * ((offset * 7919) % 4096)  # aligned as an allocation is: `view_as_complex` asks for that
        if self._values.numel() < count + shift:
            missing = count + shift - self._values.numel()
            more = torch.randn(missing, generator=self._generator, dtype=torch.float32)
            self._values = torch.cat([self._values, more])
        return self._values[shift : shift + count].view(size).to(dtype)


@dataclass(frozen=True)
class Sample:
    """A part of a batch: of values whose first dim has ``extent`` entries, the first ``kept`` (two or more)."""

    extent: int
    kept: int

    def size(self, size: Sequence[int]) -> list[int]:
        """What is left of a value of ``size``."""
        return [self.kept if place == 0 and extent == self.extent else extent for place, extent in enumerate(size)]

    def part(self, value: Any) -> Any:
        """What is left of a program's input."""
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == self.extent:
            return value[: self.kept]
        return value

    def arguments(self, node: fx.Node, values: Any) -> Any:
        """Arguments of a node: sizes that begin with the whole batch, and numbers of as many, ask for the part."""
        if node.target is torch.ops.aten.arange.default:
            return tuple(self.kept if value == self.extent else value for value in values)
        return tuple(self.size(value) if _is_size_list(value) else value for value in values)


def _is_size_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 1 and all(isinstance(item, int) for item in value)


class Probe:
    """Evaluates nodes of one program on one set of values.

    ``frontier`` are the nodes where evaluation stops: float activations there are random. With ``double`` everything
    that is a float is computed in fp64. With a ``sample`` random values, inputs and sizes are cut to it; nodes that
    name the whole batch in another way then fail, or give values of other sizes than that. A probe is made for one
    check and dropped, so that its values do not pile up.
    """

    def __init__(
        self,
        program: Program,
        frontier: Iterable[fx.Node],
        pool: Pool,
        inputs: list[Any],
        double: bool = False,
        sample: Sample | None = None,
    ) -> None:
        self.program = program
        self.pool = pool
        self.double = double
        self.sample = sample
        self.values: dict[fx.Node, Any] = {}
        given = inputs if sample is None else map(sample.part, inputs)
        self._inputs = dict(zip(program.user_inputs(), given, strict=True))
        cut = [node for node in sorted(set(frontier)) if _is_random(program, node)]
        kept = set(cut)
        self._frontier = {node: place for place, node in enumerate(cut) if not _views_another(node, kept)}

    def worthwhile_sample(self) -> Sample | None:
        """The part of the batch that is enough for a check, where that is at most half of it."""
        sizes = [_size(node) for node in self._frontier if shape(node)]
        if not sizes:
            return None
        largest = max(sizes, key=math.prod)
        extent = largest[0]
        kept = max(2, -(-extent * _ENOUGH // max(math.prod(largest), 1)))
        return Sample(extent, kept) if 2 * kept <= extent else None

    def evaluate(self, nodes: Iterable[fx.Node]) -> list[Any]:
        """Values of ``nodes``; raises ``ProbeError`` when their cone is too large or an operator fails. What lies
        between is let go as soon as nothing reads it any more."""
        wanted = list(nodes)
        order = self.order(wanted)
        kept = set(wanted)
        readers = Counter(source for node in order if not self._is_leaf(node) for source in node.all_input_nodes)
        for node in order:
            self.values[node] = self._compute(node)
            for source in () if self._is_leaf(node) else node.all_input_nodes:
                readers[source] -= 1
                if not readers[source] and source not in kept:
                    self.values.pop(source, None)
        return [self.values[node] for node in wanted]

    def order(self, wanted: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes that ``wanted`` are computed from, leaves included, each behind what it reads. Raises
        ``ProbeError`` when they are too many."""
        needed: set[fx.Node] = set()
        pending = [node for node in wanted if node not in self.values]
        while pending:
            node = pending.pop()
            if node in needed or node in self.values:
                continue
            needed.add(node)
            if len(needed) > _CONE_LIMIT:
                raise ProbeError(f"{node.name} depends on more than {_CONE_LIMIT} nodes beyond the rewrite")
            if not self._is_leaf(node):
                pending += node.all_input_nodes
        return sorted(needed)

    def leaf(self, node: fx.Node) -> int | str | None:
        """What a node where evaluation stops holds: the place of its random values, or that it is a size."""
        if node in self._frontier:
            return self._frontier[node]
        return "size" if is_size(node) else None

    def _is_leaf(self, node: fx.Node) -> bool:
        return node.op == "placeholder" or node in self._frontier or is_size(node)

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._widen(self._placeholder(node))
        if node in self._frontier:
            return self._random(node)
        if is_size(node):
            return concrete(node)
        args = fx.map_arg(node.args, lambda n: self.values[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: self.values[n])
        if self.sample is not None:
            args = self.sample.arguments(node, args)
        if self.double:
            args, kwargs = _widen_dtypes(args), _widen_dtypes(kwargs)
        try:
            with torch.no_grad():
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise ProbeError(f"{node.target} ({node.name}) failed on probe inputs: {error}") from error

    def _placeholder(self, node: fx.Node) -> Any:
        if node in self._inputs:
            return self._inputs[node]
        name = self.program.weight_name(node)
        if name is None:
            raise ProbeError(f"placeholder {node.name} is neither a weight nor a user input")
        return self.program.weights.get(name)

    def _random(self, node: fx.Node) -> Tensor:
        fake = node.meta["val"]
        size = _size(node) if self.sample is None else self.sample.size(_size(node))
        drawn = self.pool.take(size, fake.dtype, self._frontier[node]).to(fake.device)
        value: Tensor = self._widen(drawn)
        strides = sorted((i for i in range(fake.dim())), key=lambda i: -concrete(fake.stride()[i]))
        if strides != list(range(fake.dim())):  # keep the layout: `view` is legal or not depending on it
            inverse = [strides.index(i) for i in range(fake.dim())]
            value = value.reshape([size[i] for i in strides]).permute(inverse)
        return value

    def _widen(self, value: Any) -> Any:
        if self.double and isinstance(value, Tensor) and value.is_floating_point():
            return value.double()
        return value


def _size(node: fx.Node) -> list[int]:
    return [concrete(extent) for extent in shape(node)]


def index_like(program: Program, node: fx.Node, limit: int = 256) -> bool:
    """Whether ``node`` is made of integers, buffers and constants only (masks, positions, tables)."""
    seen: set[fx.Node] = set()
    pending = [node]
    parameters = program.parameters()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if len(seen) > limit:
            return False
        if current.op == "placeholder":
            name = program.weight_name(current)
            if name in parameters or (name is None and _is_float(current)):
                return False
        pending += current.all_input_nodes
    return True


def _is_random(program: Program, node: fx.Node) -> bool:
    if not _is_float(node) or node.op == "placeholder" or index_like(program, node):
        return False
    return not free_unbacked_symbols(node.meta["val"])  # a size that depends on data is only known by computing it


def _views_another(node: fx.Node, frontier: set[fx.Node]) -> bool:
    """Whether a node is a view of another node of the frontier: their values must then agree."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1 and is_view(node):
        (node,) = node.all_input_nodes
        if node in frontier:
            return True
    return False


def _is_float(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].is_floating_point()


def is_size(node: fx.Node) -> bool:
    """Whether ``node`` stands for one size, or another integer that is known when a shape is; a number that depends on
    the data is only known by computing it."""
    value = node.meta.get("val")
    known = isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool)
    return known and not free_unbacked_symbols(value)


def _widen_dtypes(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _LOW_TO_HIGH else value
    if isinstance(value, (list, tuple)):
        return type(value)(_widen_dtypes(item) for item in value)
    if isinstance(value, dict):
        return {key: _widen_dtypes(item) for key, item in value.items()}
    return value


def vary_inputs(inputs: list[Any], seed: int = 0) -> list[Any]:
    """Other inputs of the same kind: flags and 0/1 masks drawn anew (first entry kept), integers shuffled."""
    generator = torch.Generator().manual_seed(seed)
    return [_vary(value, generator) if isinstance(value, Tensor) else value for value in inputs]


def _vary(value: Tensor, generator: torch.Generator) -> Tensor:
    if value.is_floating_point() or value.is_complex() or value.numel() == 0:
        return value
    flat = value.reshape(-1).cpu()
    if value.dtype == torch.bool or bool(((flat == 0) | (flat == 1)).all()):
        drawn = torch.randint(0, 2, value.shape, generator=generator).to(value.dtype)
        if drawn.dim() > 0:
            drawn[..., 0] = value[..., 0].cpu()
        return drawn.to(value.device)
    return flat[torch.randperm(flat.numel(), generator=generator)].reshape(value.shape).to(value.device)
