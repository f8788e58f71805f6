"""Noticing cheaply that a module's weights are no longer those that were compiled."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor, nn

_version = attrgetter("_version")
_address = Tensor.data_ptr


class WeightWatch:
    """Remembers each weight's identity, memory and version; reading them all is a few C-level loops.

    ``module`` gives parameters and buffers, ``others`` are further tensors (constants). A tensor in ``mutated``
    may be written to: the compiled code reads it anew at each call. Tensors made in inference mode have no
    version.
    """

    def __init__(self, module: nn.Module | None, others: Iterable[Tensor] = (), mutated: Iterable[Tensor] = ()) -> None:
        parts = list(module.modules()) if module is not None else []
        self._holders = [held for part in parts for held in (part._parameters, part._buffers) if held]
        self._known = [dict(held) for held in self._holders]
        held = [value for values in self._known for value in values.values() if value is not None]
        self._single = [
            (holder, name, value)
            for holder in self._holders
            for name, value in holder.items()
            if value is not None and value.numel() == 1
        ]
        free = {id(tensor) for tensor in mutated}
        every = {id(tensor): tensor for tensor in (*held, *others)}
        self._tensors = [tensor for tensor in every.values() if _has_address(tensor)]
        self._versioned = [t for key, t in every.items() if key not in free and not t.is_inference()]
        self._addresses = list(map(_address, self._tensors))
        self._versions = list(map(_version, self._versioned))

    def changed(self) -> str:
        """Empty while nothing changed, else what did."""
        if self._replaced():
            return "a parameter or buffer was replaced or removed"
        if list(map(_version, self._versioned)) != self._versions:
            return "a weight was changed in place"
        if list(map(_address, self._tensors)) != self._addresses:
            return "a weight's data was moved or replaced"
        return ""

    def _replaced(self) -> bool:
        """Comparing dicts compares identities first. Tensors that differ are compared by value: more than one
        element has no truth value, which raises, and single ones are looked at here."""
        try:
            if self._holders != self._known:
                return True
        except RuntimeError:
            return True
        return not all(holder[name] is value for holder, name, value in self._single)


def _has_address(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_mkldnn
