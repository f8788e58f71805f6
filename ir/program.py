"""A captured model: a pure fx graph, and what its placeholders and outputs mean.

The graph is the one ``torch.export`` makes (training IR): every weight, buffer, constant and user input is a
placeholder, every node carries its fake value in ``meta["val"]``, nothing in it mutates, and mutated buffers are
returned as extra outputs in front of the user's. ``signature`` is torch's own ``ExportGraphSignature``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    TensorArgument,
)
from torch.utils._pytree import TreeSpec, tree_unflatten

from regraft.ir.weights import WeightOp, WeightStore

_WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(eq=False)
class Program:
    """A model as a pure graph over named weights and user inputs.

    ``in_spec`` is the pytree of ``(args, kwargs)``, ``out_spec`` that of the output. ``example`` holds the flat user
    inputs that the program was captured with; the verifier probes with them. ``reads_layout`` says that the model asked
    for the strides of tensors while it was captured, so that the program holds for inputs of these strides only.
    ``conditions`` on symbolic sizes are those that a loaded program was saved with: a captured one has its own in the
    shape environment (``ir/conditions.py``).
    """

    module: fx.GraphModule
    signature: ExportGraphSignature
    weights: WeightStore
    in_spec: TreeSpec
    out_spec: TreeSpec
    example: list[Any]
    range_constraints: dict[Any, Any] = field(default_factory=dict)
    reads_layout: bool = False
    conditions: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self._weight_of: dict[str, str] = {
            spec.arg.name: spec.target
            for spec in self.signature.input_specs
            if spec.kind in _WEIGHT_KINDS and spec.target is not None
        }
        self._placeholder_of = {target: name for name, target in self._weight_of.items()}
        self._nodes: dict[str, fx.Node] = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        self._user_inputs = [
            self._nodes[spec.arg.name]
            for spec in self.signature.input_specs
            if spec.kind == InputKind.USER_INPUT and spec.arg.name in self._nodes
        ]
        self._parameters = {
            spec.target for spec in self.signature.input_specs if spec.kind == InputKind.PARAMETER and spec.target
        }
        self.fake_mode = _fake_mode_of(self.graph)

    @property
    def graph(self) -> fx.Graph:
        """The fx graph; rewrites change it in place."""
        return self.module.graph

    @property
    def output_node(self) -> fx.Node:
        """The graph's single output node."""
        return self.graph.output_node()

    def weight_name(self, node: fx.Node) -> str | None:
        """The weight that a placeholder stands for; None for a user input or any other node."""
        return self._weight_of.get(node.name) if node.op == "placeholder" else None

    def is_made_of_weights(self, node: fx.Node) -> bool:
        """Whether no user input is read for ``node``; its sizes may be."""
        pending, seen = [node], set[fx.Node]()
        while pending:
            at = pending.pop()
            if at in seen or at.target is torch.ops.aten.sym_size.int:
                continue
            seen.add(at)
            if at.op == "placeholder" and self.weight_name(at) is None:
                return False
            pending += at.all_input_nodes
        return True

    def user_inputs(self) -> list[fx.Node]:
        """The placeholders of the user's flat inputs, in the order of ``in_spec``."""
        return list(self._user_inputs)

    def weight_placeholders(self) -> list[fx.Node]:
        """The placeholders of weights, buffers and constants."""
        return [self._nodes[name] for name in self._weight_of]

    def weight_count(self) -> int:
        """Number of weight placeholders; those added later stand behind them in ``weight_placeholders()``."""
        return len(self._weight_of)

    def parameters(self) -> set[str]:
        """Names of the weights that are parameters (not buffers, constants or derived)."""
        return self._parameters

    def derive_weight(self, hint: str, op: WeightOp) -> fx.Node:
        """The placeholder of a weight computed from others by ``op``, made on first use."""
        return self._weight_placeholder(self.weights.derive(hint, op))

    def add_constant(self, hint: str, value: Tensor) -> fx.Node:
        """A placeholder for a tensor that a rewrite has computed once."""
        return self._weight_placeholder(self.weights.add_constant(hint, value))

    def mutated(self) -> dict[str, str]:
        """Output node name -> buffer name, for buffers that the model mutates."""
        return {
            spec.arg.name: spec.target
            for spec in self.signature.output_specs
            if spec.kind == OutputKind.BUFFER_MUTATION and spec.target is not None
        }

    def drop_unused_weights(self) -> None:
        """Remove placeholders of weights that no node reads (buffers that are mutated stay)."""
        mutated = set(self.mutated().values())
        for node in self.weight_placeholders():
            if not node.users and self._weight_of[node.name] not in mutated:
                self._forget(node)
        kept = set(self._weight_of)
        self.signature.input_specs[:] = [
            spec for spec in self.signature.input_specs if spec.kind not in _WEIGHT_KINDS or spec.arg.name in kept
        ]
        self.weights.keep_only(set(self._weight_of.values()))

    def forget_weight(self, node: fx.Node) -> None:
        """Take back a weight placeholder that a rolled back rewrite had added."""
        name = self._weight_of[node.name]
        self.signature.input_specs[:] = [spec for spec in self.signature.input_specs if spec.arg.name != node.name]
        self._forget(node)
        self.weights.discard(name)

    def callable(self) -> Callable[..., Any]:
        """The program as a function of flat user inputs returning flat outputs, run op by op in eager mode."""
        self.module.recompile()
        weights = [self.weights.get(self._weight_of[node.name]) for node in self.weight_placeholders()]
        order = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        weight_values = dict(zip((node.name for node in self.weight_placeholders()), weights, strict=True))
        user_names = [node.name for node in self.user_inputs()]

        def run(*flat_inputs: Any) -> Any:
            values = {**weight_values, **dict(zip(user_names, flat_inputs, strict=True))}
            with torch.no_grad():
                return self.module.forward(*[values[name] for name in order])

        return run

    def user_outputs(self, flat_outputs: Any) -> Any:
        """The user's output structure from the graph's flat outputs (mutation outputs are left out)."""
        kept = [
            value if not isinstance(spec.arg, ConstantArgument) else spec.arg.value
            for spec, value in zip(self.signature.output_specs, flat_outputs, strict=True)
            if spec.kind == OutputKind.USER_OUTPUT
        ]
        return tree_unflatten(kept, self.out_spec)

    def copy(self) -> Program:
        """An independent graph over the same tensors."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        twin = fx.GraphModule(self.module, _with_metadata(self.graph, graph))
        return Program(
            module=twin,
            signature=ExportGraphSignature(list(self.signature.input_specs), list(self.signature.output_specs)),
            weights=self.weights.copy(),
            in_spec=self.in_spec,
            out_spec=self.out_spec,
            example=list(self.example),
            range_constraints=dict(self.range_constraints),
            reads_layout=self.reads_layout,
            conditions=self.conditions,
        )

    @staticmethod
    def from_exported(exported: ExportedProgram, example: list[Any]) -> Program:
        """Take over an ``ExportedProgram`` whose graph is functional; tied weights keep sharing their tensor."""
        tensors: dict[str, Tensor] = {}
        for spec in exported.graph_signature.input_specs:
            if spec.kind in _WEIGHT_KINDS and spec.target is not None:
                held = exported.state_dict if spec.target in exported.state_dict else exported.constants
                tensors[spec.target] = held[spec.target]
        call_spec = exported.call_spec
        return Program(
            module=exported.graph_module,
            signature=exported.graph_signature,
            weights=WeightStore(tensors),
            in_spec=call_spec.in_spec,
            out_spec=call_spec.out_spec,
            example=example,
            range_constraints=dict(exported.range_constraints),
        )

    def _weight_placeholder(self, name: str) -> fx.Node:
        if name in self._placeholder_of:
            return self._nodes[self._placeholder_of[name]]
        with self.fake_mode:
            value = self.weights.get(name, self._fake)
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder("w_" + "".join(c if c.isalnum() else "_" for c in name))
        node.target, node.meta["val"] = node.name, value  # generated code takes the target for the argument's name
        self._nodes[node.name] = node
        self._weight_of[node.name] = name
        self._placeholder_of[name] = node.name
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name, persistent=None)
        self.signature.input_specs.insert(0, spec)
        return node

    def _fake(self, value: Tensor) -> Tensor:
        with unset_fake_temporarily():
            real = value.detach()
        return self.fake_mode.from_tensor(real, static_shapes=True)

    def _forget(self, node: fx.Node) -> None:
        name = self._weight_of.pop(node.name)
        del self._placeholder_of[name]
        del self._nodes[node.name]
        self.graph.erase_node(node)


def _fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode()


def _with_metadata(source: fx.Graph, target: fx.Graph) -> fx.Graph:
    for old, new in zip(source.nodes, target.nodes, strict=True):
        new.meta = dict(old.meta)
        new.name = old.name  # copying renames what is called like a builtin ("input"), and signatures go by name
    return target
