"""Emitting the kernel of a plan: which tokens of each sample stay and which go where, in one launch.

One program a sample. Cosines are made a tile at a time, and of each row only the best so far is kept, so that memory is
linear in the number of tokens. What goes is found by counting how many ranks are higher, ties by index: no sort, the
same plan on every call, and nothing that another sample of the batch could change. Between its steps a program hands
numbers to itself through memory, behind barriers.
"""

from __future__ import annotations

import re

import torch

from regraft.codegen.triton.emit import (
    POINTER_KINDS,
    Entry,
    Kernel,
    Origin,
    Parameter,
    digest,
    dtype_name,
    header,
    render,
)
from regraft.codegen.triton.tokens.configs import plan_configs
from regraft.codegen.triton.tokens.plan_spec import PlanSpec

_NAME = "token_plan"
_TITLE = "Which tokens of each sample stay, and which go where: one program a sample."
_TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
_TYPES = {"remove": "int", "prefix": "int", "suffix": "int", "margin": "float"}
#: Sizes that every variant of a kernel serves, be they 1 or multiples of 16.
_SIZES = ("tokens", "heads", "removed", "prefix", "suffix", "margin")


def emit_plan(spec: PlanSpec, origins: tuple[Origin, ...] = ()) -> Kernel:
    """The kernel; it takes what ``spec.operands`` names and returns ``kept``, ``sources`` and ``slots`` as
    ``regraft::plan_merge`` does."""
    parameters = _parameters(spec)
    configs = plan_configs(spec.dtype)
    ordered = spec.matching in ("energy", "distinct")
    strides = ("WIDTH", "1") if spec.heads else ("metric_stride_token", "metric_stride_column")
    body = render(
        "plan.py.j2",
        name=f"{_NAME}_@",
        spec=spec,
        configs=configs,
        count_numbers=1 + spec.compares + spec.scales + ordered,
        count_marks=2 + 2 * spec.paired + ordered,
        token_strides=", ".join(strides),
        compared_with=["metric_rows", "length_rows", "rows", "columns", "tokens", *strides, "BLOCK_K"],
        precision=', input_precision="ieee"' if spec.dtype == torch.float32 else "",
        kernel_arguments=[parameter.name for parameter in parameters],
        unspecialized=[
            f'"{parameter.name}"'
            for parameter in parameters
            if parameter.name in _SIZES or parameter.name.endswith(("_stride_batch", "_stride_head"))
        ],
        parameters=[f"{name}: {_TYPES.get(name, 'Tensor')}" for name in spec.operands],
        arguments=list(spec.operands),
        far=_far(spec),
        launch_values=[_launch_value(spec, parameter.name) for parameter in parameters],
    )
    body = re.sub(r"\n{4,}", "\n\n\n", body)
    name = f"{_NAME}_{digest(body, 8)}"
    source = header(_TITLE, _facts(spec), origins) + body.replace(f"{_NAME}_@", name)
    return Kernel(name, source, (Entry(name, parameters, _TILES, configs),), spec.operands)


def _facts(spec: PlanSpec) -> dict[str, str]:
    given = [f"metric {dtype_name(spec.dtype)} of width {spec.width}{', a mean over heads' if spec.heads else ''}"]
    given += [f"scores {dtype_name(spec.scores)}"] if spec.scores else []
    given += ["padding"] if spec.keep else []
    return {"matching": spec.matching + (", into later tokens only" if spec.causal else ""), "from": ", ".join(given)}


def _parameters(spec: PlanSpec) -> tuple[Parameter, ...]:
    even = spec.width % 16 == 0
    found = [Parameter("metric", POINTER_KINDS[spec.dtype], aligned=True)]
    found += [Parameter("scores", POINTER_KINDS[spec.scores], aligned=True)] if spec.scores else []
    found += [Parameter("keep", "*u8", aligned=True)] if spec.keep else []
    found += [Parameter(name, "*i64", aligned=True) for name in ("kept", "sources", "slots")]
    found += [Parameter("numbers", "*fp32", aligned=True), Parameter("marks", "*i32", aligned=True)]
    found += [Parameter("mean", POINTER_KINDS[spec.dtype], aligned=True)] if spec.heads else []
    found += [Parameter("tokens", "i32"), *([Parameter("heads", "i32")] if spec.heads else [])]
    found += [Parameter(name, "i32") for name in ("removed", "prefix", "suffix")]
    found += [Parameter("margin", "fp32")] if spec.matching == "energy" else []
    found += [Parameter("metric_stride_batch", "i64")]
    found += [Parameter("metric_stride_head", "i32")] if spec.heads else []
    found += [Parameter("metric_stride_token", "i32", aligned=even), Parameter("metric_stride_column", "i32", 1)]
    for name in ("scores", "keep"):
        if name in spec.operands:
            found += [Parameter(f"{name}_stride_batch", "i32"), Parameter(f"{name}_stride_token", "i32", 1)]
    return tuple(found)


def _launch_value(spec: PlanSpec, name: str) -> str:
    tensor, mark, dim = name.partition("_stride_")
    if not mark:
        return {"removed": "remove", "heads": "metric.shape[1]", "keep": "keep.view(torch.uint8)"}.get(name, name)
    place = {"batch": 0, "head": 1, "token": 1 + (tensor == "metric" and spec.heads), "column": -1}[dim]
    return f"{tensor}.stride({place})"


def _far(spec: PlanSpec) -> list[str]:
    """How far the last number that a program reads lies from the first, as it counts in 32 bit."""
    found = ["metric.stride(-1) * WIDTH.value", "metric.stride(-2)", f"{2 + 2 * spec.paired} * tokens"]
    found += ["metric.stride(1) * metric.shape[1]"] if spec.heads else []
    found += ["tokens * WIDTH.value"] if spec.heads else []
    found += [f"{name}.stride(1) * tokens" for name in ("scores", "keep") if name in spec.operands]
    return found
