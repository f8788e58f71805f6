"""Outputs of a model as a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.cli.common import Refused
from regraft.files import replacing

if TYPE_CHECKING:
    from torch import Tensor


def write_outputs(path: Path, outputs: Any) -> dict[str, list[int]]:
    """Write every tensor of ``outputs`` under its place in the structure; returns name -> shape.

    A lone tensor is called "output", an item of a tuple "0", a field of a dict or ``ModelOutput`` its name,
    nested ones "past.0.1". Raises ``Refused`` when there is no tensor.
    """
    from safetensors.torch import save_file

    tensors = name_tensors(outputs)
    if not tensors:
        raise Refused("the model returned no tensor, so there is nothing to write")
    with replacing(path) as temporary:
        save_file(tensors, temporary)
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def name_tensors(outputs: Any) -> dict[str, Tensor]:
    """The tensors of a nested output by dotted name, each in memory of its own."""
    import torch
    from torch.utils._pytree import tree_flatten_with_path

    leaves, _ = tree_flatten_with_path(outputs)
    return {
        ".".join(_step(key) for key in path) or "output": value.detach().cpu().clone().contiguous()
        for path, value in leaves
        if isinstance(value, torch.Tensor)
    }


def _step(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
