"""The example inputs of a program: tensors in ``example.safetensors``, the rest in ``graph.json``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.artifact.errors import ArtifactError, brief
from regraft.artifact.values import decode_value, encode_value
from regraft.ir.nodes import concrete
from regraft.ir.program import Program


def split_example(program: Program, keep: bool) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors to store by position, and the flat list of inputs as JSON.

    Without ``keep`` tensors become zeros of the same shape when the artifact is loaded.
    """
    tensors: dict[str, Tensor] = {}
    values: list[Any] = []
    for position, value in enumerate(program.example):
        if not isinstance(value, Tensor):
            values.append(encode_value(value))
        elif keep:
            tensors[str(position)] = value
            values.append({"stored": str(position)})
        else:
            dtype = str(value.dtype).removeprefix("torch.")
            values.append({"zeros": [{"dtype": dtype}, [concrete(size) for size in value.shape]]})
    return tensors, values


def join_example(tensors: dict[str, Tensor], values: Any) -> list[Any]:
    """Inverse of :func:`split_example`; raises ``ArtifactError`` when the data is malformed."""
    if not isinstance(values, list):
        raise ArtifactError("graph.json has no list of example inputs; save the model again")
    return [_join(tensors, value) for value in values]


def _join(tensors: dict[str, Tensor], value: Any) -> Any:
    if not isinstance(value, dict):
        return decode_value(value)
    try:
        if "stored" in value:
            return tensors[value["stored"]]
        if "zeros" in value:
            dtype, shape = value["zeros"]
            # One zero, expanded: a file cannot make the loader take memory that it does not hold itself.
            return torch.zeros((), dtype=decode_value(dtype)).expand(shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"graph.json has a malformed example input ({brief(error)}); save the model again"
        ) from error
    return decode_value(value)
