"""Which sizes of the inputs are symbolic, and whether they stayed so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from regraft.ir.capture_error import CaptureError

_LOG = logging.getLogger("regraft")


def dynamic_shapes(dynamic: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: list[str]) -> Any:
    """The ``dynamic_shapes`` argument of ``torch.export``.

    ``None`` and ``False`` make every size static, ``True`` every size of every tensor symbolic where the model
    allows it; anything else is a ``torch.export`` specification and passes through. ``names`` are the parameters
    that ``args`` fill. Raises ``CaptureError`` when an example size of 0 or 1 would silently fix a size.
    """
    if dynamic is None or dynamic is False:
        return None
    if dynamic is not True:
        return dynamic
    for path, value in tree_flatten_with_path((args, dict(kwargs)))[0]:
        if isinstance(value, Tensor):
            _refuse_small(_label(path, names), value)
    spec = tree_map(_all_symbolic, {**dict(zip(names, args, strict=False)), **kwargs})
    if len(args) > len(names):  # *args: by position instead
        return (*tree_map(_all_symbolic, args), *tree_map(_all_symbolic, tuple(kwargs.values())))
    return spec


def _label(path: tuple[Any, ...], names: list[str]) -> str:
    place = getattr(path[1], "idx", None) if len(path) > 1 else None
    if getattr(path[0], "idx", None) == 0 and place is not None and place < len(names):
        return f"{names[place]}{keystr(path[2:])}"
    text = f"{keystr(path[1:])}"
    return text.strip("[]'") if len(path) == 2 else text


def _is_symbol(size: Any) -> bool:
    """Whether a size is still free; one that the model has settled is a symbol with a number for its value."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def _all_symbolic(value: Any) -> Any:
    return {dim: Dim.AUTO for dim in range(value.dim())} if isinstance(value, Tensor) else None


def _refuse_small(name: str, value: Tensor) -> None:
    for dim, size in enumerate(value.shape):
        if size < 2:
            raise CaptureError(
                f"dynamic=True was given, but the example input {name} has size {size} along dimension {dim}, which "
                "torch.export would fix for good; give an example with sizes of at least 2, or a dynamic_shapes "
                "specification that names the symbolic dimensions"
            )


def check_symbols(graph: fx.Graph, user_inputs: list[fx.Node], dynamic: Any) -> None:
    """Raise ``CaptureError`` when sizes were to be symbolic and none stayed so; log those that the model fixed."""
    if dynamic is None or dynamic is False:
        return
    values = [(node, node.meta.get("val")) for node in user_inputs]
    tensors = [(node.name, value) for node, value in values if isinstance(value, Tensor)]
    symbolic = [size for _, value in tensors for size in value.shape if _is_symbol(size)]
    if not symbolic:
        raise CaptureError(
            f"symbolic sizes were asked for (dynamic={dynamic!r}), but the model works only at the example's sizes "
            f"({', '.join(f'{name} {list(value.shape)}' for name, value in tensors) or 'no tensor input'}); give an "
            "example with sizes of at least 2, or leave dynamic out: a new shape is then captured when it comes"
        )
    if dynamic is True:
        fixed = [
            f"{name}[{dim}] = {size}"
            for name, value in tensors
            for dim, size in enumerate(value.shape)
            if not _is_symbol(size)
        ]
        if fixed:
            _LOG.info("the model fixes these sizes: %s", ", ".join(fixed))
