"""Filling a report from programs: operator rows by the cost model, and the environment of the numbers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import fx

from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.ir.cost import compute_dtype, graph_cost
from regraft.ir.device import Device
from regraft.report.model import Environment, OperatorRow

_PACKAGES = ("regraft", "torch", "triton", "transformers", "safetensors", "numpy")


def operator_rows(graph: fx.Graph, device: Device) -> list[OperatorRow]:
    """One row a call of ``graph``, with its work and the cost model's time; not measured."""
    return [
        OperatorRow(
            node=node.node,
            operator=node.operator,
            user_line=node.user_line,
            provenance=node.provenance,
            flops=node.cost.flops,
            bytes=node.cost.bytes,
            predicted_seconds=node.seconds,
            known=node.known,
        )
        for node in graph_cost(graph, device).nodes
    ]


def main_dtype(graph: fx.Graph) -> torch.dtype:
    """The element type that most calls of ``graph`` compute in; fp32 for a graph without calls."""
    counts: dict[torch.dtype, int] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            dtype = compute_dtype(node)
            counts[dtype] = counts.get(dtype, 0) + 1
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def environment(device: Device, dtype: torch.dtype) -> Environment:
    """Where the numbers of a report come from."""
    return Environment(
        device=device.name,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        peak_flops=device.peak(dtype),
        bytes_per_second=device.bytes_per_second,
        rates_from=device.source,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    missing = NATIVE.missing()
    found["native kernels"] = f"none: {missing}" if missing else "built for this processor"
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
