"""Which sizes of the inputs are symbolic, and whether they stayed so."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from regraft.ir.capture_error import CaptureError
from regraft.ir.capture_state import replaced_forward
from regraft.ir.conditions import conditions_of
from regraft.ir.program import Program

_LOG = logging.getLogger("regraft")


def dynamic_shapes(dynamic: Any, inputs: Mapping[str, Any]) -> Any:
    """The ``dynamic_shapes`` argument of ``torch.export``.

    ``None`` and ``False`` make every size static, ``True`` every size of every tensor symbolic where the model
    allows it; anything else is a ``torch.export`` specification and passes through. ``inputs`` are the example's by
    the parameter of ``call_signature`` that takes them, those of ``*args`` as a tuple. Raises ``CaptureError`` when
    an example size of 0 or 1 would silently fix a size.
    """
    if dynamic is None or dynamic is False:
        return None
    if dynamic is not True:
        return dynamic
    for name, given in inputs.items():
        for path, value in tree_flatten_with_path(given)[0]:
            if isinstance(value, Tensor):
                _refuse_small(f"{name}{keystr(path)}", value)
    return tree_map(_all_symbolic, dict(inputs))


def call_signature(forward: Callable[..., Any], keywords: Iterable[str]) -> inspect.Signature:
    """The signature of ``forward``; of the ``keywords`` that its ``**`` takes, each is a parameter of its own."""
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return signature
    taken = [name for name in keywords if name not in signature.parameters]
    spelled = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in taken]
    return signature.replace(parameters=[*parameters[:-1], *spelled, parameters[-1]])


@contextlib.contextmanager
def spelled_keywords(model: nn.Module, keywords: Iterable[str]) -> Iterator[None]:
    """Inside, ``forward`` has its ``call_signature``: ``torch.export`` takes no symbolic sizes in a ``**``."""
    original = model.forward
    signature = call_signature(original, keywords)
    if signature == inspect.signature(original):
        yield
        return

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    with replaced_forward(model, forward):
        yield


def is_symbol(size: Any) -> bool:
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


def settle_equal_sizes(program: Program) -> None:
    """Make one symbol of two that a branch of the model found equal as a part of sums: export keeps ``a + c == b + c``
    as a condition, and nothing that compares sizes would see that ``a`` is ``b``."""
    shape_env = program.fake_mode.shape_env
    for condition in conditions_of(program):
        if shape_env is None or not isinstance(condition, sympy.Eq):
            continue
        difference = shape_env.replace(condition.lhs - condition.rhs).expand()
        symbols = sorted(difference.free_symbols, key=str)
        if len(symbols) == 2 and difference in (symbols[0] - symbols[1], symbols[1] - symbols[0]):
            kept, gone = symbols
            shape_env._set_replacement(gone, kept, "a condition of the model")
            ranges = program.range_constraints
            if shape_env.replace(gone) == kept and gone in ranges:
                ranges[kept] = ranges.get(kept, ranges[gone]) & ranges.pop(gone)


def check_symbols(graph: fx.Graph, user_inputs: list[fx.Node], dynamic: Any) -> None:
    """Raise ``CaptureError`` when sizes were to be symbolic and none stayed so; log those that the model fixed."""
    if dynamic is None or dynamic is False:
        return
    values = [(node, node.meta.get("val")) for node in user_inputs]
    tensors = [(node.name, value) for node, value in values if isinstance(value, Tensor)]
    symbolic = [size for _, value in tensors for size in value.shape if is_symbol(size)]
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
            if not is_symbol(size)
        ]
        if fixed:
            _LOG.info("the model fixes these sizes: %s", ", ".join(fixed))
