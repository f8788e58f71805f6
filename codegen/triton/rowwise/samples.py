"""The row-wise kernels of the catalogue (``catalogue.py``): regions as models have them, at the sizes of models."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from regraft.codegen.rowwise.expand import Calls
from regraft.codegen.triton.emit import Kernel, dtype_name
from regraft.codegen.triton.rowwise.emit import emit_region
from regraft.ir import ops

aten = torch.ops.aten
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
Writes = Callable[..., list[fx.Node]]


@dataclass(frozen=True)
class RegionSample:
    """A region of the catalogue: the calls that ``writes`` writes into an empty graph for inputs of ``sizes``, and the
    ``emitter`` of its kernel."""

    kind: torch.dtype
    writes: Writes
    sizes: tuple[tuple[int, ...], ...]
    emitter: Callable[..., Any] = emit_region

    def emit(self) -> Kernel:
        """Its kernel."""
        kernel: Kernel = self._emitted().kernel
        return kernel

    def read(self) -> list[int]:
        """Which of the inputs the kernel takes, in its order."""
        return [int(node.name[1:]) for node in self._emitted().inputs]

    def _emitted(self) -> Any:
        return self.emitter(*written(self.kind, self.writes, self.sizes))


def rowwise_samples() -> dict[str, Callable[[], Kernel]]:
    """Emitters by name."""
    return {name: sample.emit for name, sample in all_regions().items()}


def all_regions() -> dict[str, RegionSample]:
    """The samples by name. All dims but the last are rows, of which a kernel takes any number."""
    found: dict[str, RegionSample] = {}
    for kind in (_BF16, _FP16, _FP32):
        for width in (768, 4096, 8192) if kind == _BF16 else (4096,):
            rows, weight = (8, 512, width), (width,)
            name = f"{dtype_name(kind)} {width}"
            found[f"residual, rms norm {name}"] = _sample(kind, _add_rms, rows, rows, weight)
            found[f"residual, layer norm {name}"] = _sample(kind, _add_layer, rows, rows, weight, weight)
            found[f"gate silu {name}"] = _sample(kind, _gate, rows, rows)
    rows = (8, 512, 4096)
    found["rms norm applied in fp32 bfloat16 4096"] = _sample(_BF16, _gemma, rows, (4096,))
    found["rms norm bfloat16 16384"] = _sample(_BF16, _gemma, (8, 512, 16384), (16384,))
    found["modulated norm bfloat16 1152"] = _sample(_BF16, _modulated, (8, 256, 1152), (8, 1, 1152), (8, 1, 1152))
    found["gelu bfloat16 11008"] = _sample(_BF16, _gelu, (8, 512, 11008), (11008,))
    for head_dim in (64, 96, 128, 256):
        heads, table = (8, 512, 32, head_dim), (512, head_dim)
        found[f"norm of heads, rope bfloat16 {head_dim}"] = _sample(_BF16, _norm_rope, heads, (head_dim,), table, table)
    heads = (8, 32, 512, 128)
    found["rope interleaved bfloat16 128"] = _sample(_BF16, _interleaved, heads, (512, 128), (512, 128))
    found["rope of half the columns bfloat16 128"] = _sample(_BF16, _partial, heads, (512, 64), (512, 64))
    for width in (1024, 5000, 32000):
        found[f"softmax float32 {width}"] = _sample(_FP32, _softmax, (64, width))
    return found


def _sample(kind: torch.dtype, writes: Writes, *sizes: tuple[int, ...]) -> RegionSample:
    return RegionSample(kind, writes, sizes)


def written(
    kind: torch.dtype, writes: Writes, sizes: Sequence[tuple[int, ...]]
) -> tuple[list[fx.Node], list[fx.Node], FakeTensorMode]:
    """The calls that ``writes`` writes into an empty graph for inputs of ``sizes``, and the results that it returns."""
    graph, mode = fx.Graph(), FakeTensorMode()
    inputs = []
    for number, size in enumerate(sizes):
        node = graph.placeholder(f"x{number}")
        with mode:
            value: Tensor = torch.empty(size, dtype=kind)
        node.meta["val"] = value
        inputs.append(node)
    outputs = writes(Calls(graph, graph.output(()), mode), *inputs)
    return [node for node in graph.nodes if node.op == "call_function"], outputs, mode


def _parts(build: Calls, both: fx.Node) -> list[fx.Node]:

    return [build.call(operator.getitem, both, place) for place in (0, 1)]


def _add_rms(build: Calls, x: Any, residual: Any, weight: Any) -> list[fx.Node]:
    return _parts(build, build.call(ops.add_norm, x, residual, weight, None, 1e-6, "rms_norm"))


def _add_layer(build: Calls, x: Any, residual: Any, weight: Any, bias: Any) -> list[fx.Node]:
    return _parts(build, build.call(ops.add_norm, x, residual, weight, bias, 1e-6, "layer_norm"))


def _gate(build: Calls, gate: Any, up: Any) -> list[fx.Node]:
    return [build.call(ops.glu, gate, up, "silu")]


def _gemma(build: Calls, x: Any, weight: Any) -> list[fx.Node]:
    return [build.call(ops.rms_norm, x, weight, 1e-6, 1.0, "after_weight")]


def _modulated(build: Calls, x: Any, shift: Any, scale: Any) -> list[fx.Node]:
    normed = build.call(aten.layer_norm.default, x, [int(x.meta["val"].shape[-1])], None, None, 1e-6)
    scaled = build.call(aten.mul.Tensor, normed, build.call(aten.add.Tensor, scale, 1.0))
    return [build.call(aten.add.Tensor, scaled, shift)]


def _gelu(build: Calls, x: Any, bias: Any) -> list[fx.Node]:
    return [build.call(aten.gelu.default, build.call(aten.add.Tensor, x, bias))]


def _norm_rope(build: Calls, x: Any, weight: Any, cos: Any, sin: Any) -> list[fx.Node]:
    normed = build.call(aten.permute.default, build.call(ops.rms_norm, x, weight, 1e-6), [0, 2, 1, 3])
    return [build.call(ops.rope, normed, cos, sin, int(x.meta["val"].shape[-1]))]


def _interleaved(build: Calls, x: Any, cos: Any, sin: Any) -> list[fx.Node]:
    return [build.call(ops.rope, x, cos, sin, 128, "interleaved")]


def _partial(build: Calls, x: Any, cos: Any, sin: Any) -> list[fx.Node]:
    return [build.call(ops.rope, x, cos, sin, 64)]


def _softmax(build: Calls, x: Any) -> list[fx.Node]:
    return [build.call(aten.softmax.int, build.call(aten.mul.Tensor, x, 0.125), -1)]
