"""Weights in an artifact: original tensors once each, and what is made of them.

``weight_ops.json``::

    {"tensors": {name: [stored name, layout]},   layout is null, or [order of dimensions, sizes to expand to]
     "derived": {name: {op, inputs, options}}}

Names with the same entry are tied: after loading they are the very same tensor again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from regraft.artifact.errors import ArtifactError, brief
from regraft.artifact.tensors import check_storable
from regraft.ir.weights import WEIGHT_OPS, WeightError, WeightOp, WeightStore

_REPLAY_LIMIT = 1_000_000  # weights read when every derived weight is computed from scratch


def split_weights(weights: WeightStore) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors to store (views of the originals, nothing is copied), and the data for ``weight_ops.json``."""
    stored: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    seen: dict[Any, Any] = {}
    for name in sorted(weights.originals):
        tensor = weights.originals[name]
        check_storable(name, tensor)
        key = _identity(name, tensor)
        if key not in seen:
            compact, layout = _compact(tensor.detach())
            stored[name] = compact
            seen[key] = [name, layout]
        table[name] = seen[key]
    derived = {name: op.to_json() for name, op in weights.derived.items()}
    return stored, {"tensors": table, "derived": derived}


def join_weights(stored: dict[str, Tensor], data: Any) -> WeightStore:
    """Inverse of :func:`split_weights`; raises ``ArtifactError`` when the data is malformed."""
    try:
        views: dict[str, Tensor] = {}
        originals: dict[str, Tensor] = {}
        for name, entry in data["tensors"].items():
            key = repr(entry)
            if key not in views:
                views[key] = _restore(stored[entry[0]], entry[1])
            originals[name] = views[key]
        store = WeightStore(originals)
        for name, op in data["derived"].items():
            if name in originals:
                raise WeightError(f"{name!r} is both stored and derived")
            store.derived[name] = WeightOp.from_json(op)
        _check_derived(store)
    except ArtifactError:
        raise
    except Exception as error:  # options of an operation can be wrong in any way; all mean the same to the user
        raise ArtifactError(f"weight_ops.json is malformed ({brief(error)}); save the model again") from error
    return store


def _identity(name: str, tensor: Tensor) -> Any:
    if not tensor.numel():
        return id(tensor)
    return (
        tensor.data_ptr(),
        tensor.device,
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _compact(tensor: Tensor) -> tuple[Tensor, Any]:
    """The tensor with dimensions in memory order and expanded ones cut to size one."""
    if tensor.is_contiguous() or not tensor.numel():
        return tensor, None
    strides: tuple[int, ...] = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
    sizes = list(tensor.shape) if 0 in strides else None
    for dim, stride in enumerate(strides):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.permute(order), [order, sizes]


def _restore(tensor: Tensor, layout: Any) -> Tensor:
    if layout is None:
        return tensor
    order, sizes = layout
    inverse = sorted(range(len(order)), key=order.__getitem__)
    restored = tensor.permute(inverse)
    return restored if sizes is None else restored.expand(sizes)


def _check_derived(store: WeightStore) -> None:
    """Every operation must run (on fake tensors), and replaying all must not take forever."""
    mode = FakeTensorMode()
    cost = dict.fromkeys(store.originals, 1)
    fakes: dict[str, Tensor] = {
        name: mode.from_tensor(tensor, static_shapes=True) for name, tensor in store.originals.items()
    }
    pending = dict(store.derived)
    while pending:
        ready = [name for name, op in pending.items() if all(part in fakes for part in op.inputs)]
        if not ready:
            raise WeightError(f"{next(iter(pending))!r} is derived from itself or from a weight that is not stored")
        for name in ready:
            op = pending.pop(name)
            with mode, torch.no_grad():
                fakes[name] = WEIGHT_OPS[op.op]([fakes[part] for part in op.inputs], **op.options)
            if not isinstance(fakes[name], Tensor):
                raise WeightError(f"{name!r} is not a tensor")
            cost[name] = 1 + sum(cost[part] for part in op.inputs)
            if cost[name] > _REPLAY_LIMIT:
                raise WeightError(f"{name!r} takes too many operations to compute")
