"""The ``regraft`` backend of ``torch.compile``: each graph between graph breaks is compiled as a model of its own.

Dynamo hands parameters and buffers over as inputs; here they become weights again, so that they can be prepacked,
and are watched as those of any compiled model. The graph is captured at its first call, when the inputs are real.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from regraft.api import VERIFY
from regraft.compiled import CompiledModule
from regraft.errors import OptionError
from regraft.options import Options
from regraft.report.model import Report

_LOG = logging.getLogger("regraft")
_MAXIMUM_WEIGHT_SETS = 8


def backend(
    module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Any:
    """Compile one Dynamo graph; ``options`` may hold ``verify`` ("each", "final" or "off"), ``mode`` is Inductor's.

    The original graph runs, with a logged reason, where compiled code may not: under autocast, for gradients, for
    a device or for sizes that regraft has no code for.
    """
    if mode not in (None, "default"):
        raise OptionError(
            f"mode={mode!r} was given, which belongs to Inductor; leave it out, or choose backend='inductor'"
        )
    given = dict(options or {})
    verify = given.pop("verify", "each")
    if given or verify not in VERIFY:
        raise OptionError(
            f"the options {dict(options or {})} were given; the backend knows "
            f"verify, one of {', '.join(map(repr, VERIFY))}"
        )
    places = [place for place, value in enumerate(example_inputs) if _is_weight(value)]
    return _DynamoGraph(module, places, verify)


def _is_weight(value: Any) -> bool:
    """Parameters, and buffers, which Dynamo marks as tensors of a fixed address."""
    marked = getattr(value, "_dynamo_static_input_type", None)
    return isinstance(value, Tensor) and (isinstance(value, nn.Parameter) or marked is not None)


class _Lifted(nn.Module):
    """A Dynamo graph whose weights are attributes again; called with the remaining inputs."""

    def __init__(self, module: fx.GraphModule, places: list[int], weights: list[Tensor]) -> None:
        super().__init__()
        self._run: Callable[..., Any] = module.forward
        self._places = places
        for index, weight in enumerate(weights):
            if isinstance(weight, nn.Parameter):
                self.register_parameter(f"weight_{index}", weight)
            else:
                self.register_buffer(f"weight_{index}", weight)
        self.eval()

    def forward(self, *inputs: Any) -> Any:
        """The graph's outputs."""
        merged = list(inputs)
        for index, place in enumerate(self._places):
            merged.insert(place, getattr(self, f"weight_{index}"))
        return self._run(*merged)


class _DynamoGraph:
    """One graph and its compiled forms, one for each set of weights: layers of equal code share a Dynamo graph."""

    def __init__(self, module: fx.GraphModule, places: list[int], verify: str) -> None:
        self._module = module
        self._places = places
        self._drawn = set(places)
        self._verify = verify
        self._compiled: OrderedDict[tuple[int, ...], CompiledModule] = OrderedDict()
        self._told: set[str] = set()

    def __call__(self, *inputs: Any) -> Any:
        weights = [inputs[place] for place in self._places]
        reason = self._reason(inputs, weights)
        if reason:
            self._tell(reason)
            return self._module(*inputs)
        compiled = self._for_weights(weights)
        return compiled(*(value for place, value in enumerate(inputs) if place not in self._drawn))

    def _reason(self, inputs: tuple[Any, ...], weights: list[Tensor]) -> str:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        if not tensors:
            return "it has no tensor input"
        if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
            return "a gradient could be asked for; call the model under torch.no_grad()"
        other = next((value.device for value in tensors if value.device.type != "cpu"), None)
        return f"this version has no lowering for {other}" if other is not None else ""

    def _for_weights(self, weights: list[Tensor]) -> CompiledModule:
        key = tuple(map(id, weights))
        compiled = self._compiled.get(key)
        if compiled is None:
            model = _Lifted(self._module, self._places, weights)  # holds the weights, so that ids stay theirs
            options = Options(target="cpu", verify=self._verify)
            compiled = CompiledModule(model, options, Report(model="Dynamo graph", target="cpu"))
            self._compiled[key] = compiled
            if len(self._compiled) > _MAXIMUM_WEIGHT_SETS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return compiled

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            _LOG.warning("a graph of torch.compile runs as it is: %s", reason)
