"""Emitting the merge of attention over parts of the keys: outputs weighed by their log-sum-exps.

``lse = log sum_p exp(lse_p)``, ``out = sum_p exp(lse_p - lse) out_p``: exact for parts that hold different keys of the
same queries (attention.md 3.1: local and global keys, a shared prefix, ranks that hold a part of the sequence each).
Logarithms are natural.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regraft.codegen.triton.attention_configs import combine_configs, padded
from regraft.codegen.triton.attention_spec import DTYPES, LARGEST_DIM, SMALLEST_DIM, Unsupported
from regraft.codegen.triton.emit import POINTER_KINDS, Entry, Kernel, Origin, Parameter, digest, dtype_name, header
from regraft.codegen.triton.emit import render as rendered

_TITLE = "Attention merged from parts of the keys, each with its log-sum-exp."
_NAME = "attention_merge"
_PARTS, _LSE = ("part", "batch", "head", "row", "dim"), ("part", "batch", "head", "row")


@dataclass(frozen=True)
class MergeSpec:
    """One merge: outputs ``[parts, batch, heads, length, value_dim]`` of ``dtype``, log-sum-exps the same without the
    last dim in fp32. ``sinks``: one logit a head joins the sum and gives nothing. ``empty_rows``: "nan" or "zero",
    what a row without a key in any part gives."""

    dtype: torch.dtype
    value_dim: int
    sinks: bool = False
    empty_rows: str = "nan"

    def refused(self) -> str | None:
        """Why no kernel is emitted; None where one is."""
        if self.dtype not in DTYPES:
            return f"elements are {self.dtype}, and kernels take {', '.join(map(str, DTYPES))}"
        if not SMALLEST_DIM <= self.value_dim <= LARGEST_DIM:
            return f"value_dim is {self.value_dim}, and kernels take {SMALLEST_DIM} to {LARGEST_DIM}"
        known = ("nan", "zero")
        return None if self.empty_rows in known else f"empty_rows is {self.empty_rows!r}, and a merge knows {known}"


def emit_merge(spec: MergeSpec, origins: tuple[Origin, ...] = ()) -> Kernel:
    """The kernel; its operands are ``parts``, ``part_lse`` and, where asked for, ``sinks``; it returns output and
    log-sum-exp (of the keys, without the sink). Raises ``Unsupported``."""
    reason = spec.refused()
    if reason is not None:
        raise Unsupported(reason)
    tensors = ["parts", "part_lse", *(["sinks"] if spec.sinks else [])]
    parameters = _parameters(spec)
    configs = combine_configs(spec.value_dim)
    body = rendered(
        "merge.py.j2",
        name=f"{_NAME}_@",
        spec=spec,
        dtype=f"torch.{dtype_name(spec.dtype)}",
        padded=padded,
        configs=configs,
        kernel_arguments=[parameter.name for parameter in parameters],
        launch_values=[_launch_value(parameter.name) for parameter in parameters],
        unspecialized=[f'"{name}"' for name in ("count", "row_count", "length", "heads")],
        argument_names=tensors,
        parameters=[f"{name}: Tensor" for name in tensors],
        checked=[f"{name}: Tensor" for name in tensors],
    )
    name = f"{_NAME}_{digest(body, 8)}"
    facts = {
        "element": f"{dtype_name(spec.dtype)}, value_dim {spec.value_dim}",
        "rows": f"without a key: {spec.empty_rows}",
        "with": "sinks" if spec.sinks else "",
    }
    source = header(_TITLE, facts, origins) + body.replace(f"{_NAME}_@", name)
    return Kernel(name, source, (Entry(name, parameters, ("BLOCK_ROWS",), configs),), tuple(tensors))


def _parameters(spec: MergeSpec) -> tuple[Parameter, ...]:
    element = POINTER_KINDS[spec.dtype]
    found = [Parameter("parts", element, aligned=True), Parameter("part_lse", "*fp32", aligned=True)]
    if spec.sinks:
        found.append(Parameter("sinks", "*fp32", aligned=True))
    found += [Parameter("out", element, aligned=True), Parameter("lse", "*fp32", aligned=True)]
    found += [Parameter(name, "i32") for name in ("count", "row_count", "length", "heads")]
    found += [Parameter(f"parts_stride_{dim}", "i32", 1 if dim == "dim" else None, aligned=True) for dim in _PARTS]
    found += [Parameter(f"part_lse_stride_{dim}", "i32", 1 if dim == "row" else None) for dim in _LSE]
    dims = _PARTS[1:]
    return (*found, *(Parameter(f"out_stride_{dim}", "i32", 1 if dim == "dim" else None, aligned=True) for dim in dims))


def _launch_value(name: str) -> str:
    tensor, mark, dim = name.partition("_stride_")
    if not mark:
        return name
    dims = {"parts": _PARTS, "part_lse": _LSE, "out": _PARTS[1:]}[tensor]
    return f"{tensor}.stride({dims.index(dim)})"
