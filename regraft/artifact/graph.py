"""``graph.json``: a program without the bytes of its weights.

``torch.export.save`` is not used: its archive falls back to pickle for constants, reads symbolic sizes with
``sympify`` (which evaluates text), resolves targets as dotted paths through the ``torch`` module, and imports
modules named in a tree's context. This format is data only::

    {"strings":  [text, …],                        stack traces and provenance, each once
     "symbols":  {name: {hint, range, positive, nonnegative}},
     "ranges":   [[expression, [lower, upper]], …],
     "conditions": [expression, …],                what sizes must fulfil beside their ranges
     "nodes":    [[op, name, target, args, kwargs, fake value, metadata], …],
     "inputs":   [[kind, argument, weight name, persistent], …],
     "outputs":  [[kind, argument, buffer name], …],
     "in_spec":  tree, "out_spec": tree, "example": [value, {"stored": …} or {"zeros": …}, …],
     "reads_layout": whether the program holds for inputs of its own strides only}

The target of a placeholder and of the output is null. Metadata (``stack_trace``, ``provenance``,
``nn_module_stack``) refers to the strings by index.
"""

from __future__ import annotations

import keyword
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export.graph_signature import ExportGraphSignature

from regraft.artifact.errors import ArtifactError, brief
from regraft.artifact.example import join_example
from regraft.artifact.fakes import FakeReader, encode_fake, symbols_of
from regraft.artifact.signature import decode_signature, encode_signature
from regraft.artifact.symbols import Symbols, describe, encode
from regraft.artifact.targets import decode_target, encode_target, namespace_of
from regraft.artifact.trees import decode_tree, encode_tree
from regraft.artifact.values import decode_value, encode_value
from regraft.ir.conditions import conditions_of
from regraft.ir.program import Program
from regraft.ir.weights import WeightStore


def encode_graph(program: Program) -> dict[str, Any]:
    """A program as JSON, weights and example left out; raises ``ArtifactError`` for what cannot be stored."""
    strings = _Strings()
    nodes = [_encode_node(node, strings) for node in program.graph.nodes]
    symbols = set().union(*(symbols_of(node.meta.get("val")) for node in program.graph.nodes))
    for expression in program.range_constraints:
        symbols |= expression.free_symbols
    conditions = conditions_of(program)
    for condition in conditions:
        symbols |= condition.free_symbols
    inputs, outputs = encode_signature(program.signature)
    shape_env = program.fake_mode.shape_env
    return {
        "strings": strings.table,
        "symbols": describe(symbols, shape_env) if shape_env is not None else {},
        "ranges": [
            [encode(expression), [encode(limits.lower), encode(limits.upper)]]
            for expression, limits in program.range_constraints.items()
        ],
        "conditions": [encode(condition) for condition in conditions],
        "nodes": nodes,
        "inputs": inputs,
        "outputs": outputs,
        "in_spec": encode_tree(program.in_spec),
        "out_spec": encode_tree(program.out_spec),
        "reads_layout": program.reads_layout,
    }


def namespaces_of(graph: dict[str, Any]) -> tuple[str, ...]:
    """Operator namespaces that an encoded graph calls."""
    calls = (namespace_of(node[2]) for node in graph["nodes"] if node[0] == "call_function")
    return tuple(sorted({name for name in calls if name is not None}))


def decode_graph(
    data: Any, weights: WeightStore, example: dict[str, Tensor], namespaces: Collection[str] = ()
) -> Program:
    """Inverse of :func:`encode_graph`, where ``example`` holds the tensors of ``data["example"]``.

    Raises ``ArtifactError`` for anything that a saved program would not hold.
    """
    try:
        return _decode(data, weights, example, namespaces)
    except ArtifactError:
        raise
    except RecursionError as error:
        raise ArtifactError("graph.json is nested too deeply to be an artifact's; do not trust this file") from error
    except Exception as error:  # a malformed part can fail in any way in torch or sympy; all mean the same to the user
        raise ArtifactError(f"graph.json is malformed ({brief(error)}); save the model again") from error


def _decode(data: Any, weights: WeightStore, example: dict[str, Tensor], namespaces: Collection[str]) -> Program:
    inputs = join_example(example, data["example"])
    symbols = Symbols(data["symbols"])
    reader = _GraphReader(data["strings"], FakeReader(symbols), namespaces)
    graph = reader.read(data["nodes"])
    signature = decode_signature(data["inputs"], data["outputs"])
    _check_signature(graph, signature, weights)
    _check_weights(graph, signature, weights, reader.fakes)
    in_spec, out_spec = decode_tree(data["in_spec"]), decode_tree(data["out_spec"])
    program = Program(
        module=fx.GraphModule(torch.nn.Module(), graph),
        signature=signature,
        weights=weights,
        in_spec=in_spec,
        out_spec=out_spec,
        example=inputs,
        range_constraints={symbols.decode(key): symbols.range(limits) for key, limits in data["ranges"]},
        reads_layout=data.get("reads_layout") is True,
        conditions=tuple(symbols.decode(condition) for condition in data["conditions"]),
    )
    count, outputs = len(program.user_inputs()), len(signature.user_outputs)
    if in_spec.num_leaves != count or len(inputs) != count or out_spec.num_leaves != outputs:
        raise ArtifactError("graph.json's structures do not fit its inputs and outputs; save the model again")
    program.fake_mode = reader.fakes.mode
    return program


class _Strings:
    """Each distinct string once, and its index."""

    def __init__(self) -> None:
        self.table: list[str] = []
        self._index: dict[str, int] = {}

    def add(self, text: str) -> int:
        if text not in self._index:
            self._index[text] = len(self.table)
            self.table.append(text)
        return self._index[text]


def _encode_node(node: fx.Node, strings: _Strings) -> list[Any]:
    if node.op not in ("placeholder", "call_function", "output"):
        raise ArtifactError(
            f"node {node.name} is a {node.op}, which artifacts cannot store; capture the model without control flow"
        )
    try:
        target = encode_target(node.target) if node.op == "call_function" else None
        args = [] if node.op == "placeholder" else [encode_value(argument) for argument in node.args]
        kwargs = {name: encode_value(value) for name, value in node.kwargs.items()}
        fake = encode_fake(node.meta.get("val"))
    except ArtifactError as error:
        raise ArtifactError(f"node {node.name}: {error}") from error
    return [node.op, node.name, target, args, kwargs, fake, _encode_metadata(node, strings)]


def _encode_metadata(node: fx.Node, strings: _Strings) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if isinstance(node.meta.get("stack_trace"), str):
        metadata["stack_trace"] = strings.add(node.meta["stack_trace"])
    if node.meta.get("provenance"):
        metadata["provenance"] = [strings.add(str(line)) for line in node.meta["provenance"]]
    if node.meta.get("nn_module_stack"):
        metadata["nn_module_stack"] = [
            [strings.add(str(key)), strings.add(str(path)), strings.add(_class_name(kind))]
            for key, (path, kind) in node.meta["nn_module_stack"].items()
        ]
    return metadata


def _class_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


class _GraphReader:
    """Builds an fx graph from its nodes."""

    def __init__(self, strings: list[str], fakes: FakeReader, namespaces: Collection[str]) -> None:
        if not all(isinstance(text, str) for text in strings):
            raise ArtifactError("graph.json holds a string table with other things in it; save the model again")
        self._strings = strings
        self._namespaces = namespaces
        self.fakes = fakes
        self._graph = fx.Graph()
        self._nodes: dict[str, fx.Node] = {}

    def read(self, nodes: list[Any]) -> fx.Graph:
        """The graph; its last node is the only output."""
        for place, (op, name, target, args, kwargs, fake, metadata) in enumerate(nodes):
            _check_name(name, self._nodes)
            if (op == "output") != (place == len(nodes) - 1):
                raise ArtifactError("graph.json does not end with its one output; save the model again")
            node = self._create(op, name, target, args, kwargs)
            if op != "output":
                node.meta["val"] = self.fakes.read(fake)
                self._nodes[name] = node
            node.meta.update(self._metadata(metadata))
        self._graph.lint()
        return self._graph

    def _create(self, op: Any, name: str, target: Any, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
        if op == "placeholder":
            node = self._graph.create_node(op, name, name=name)
        elif op == "output":
            node = self._graph.output(decode_value(args, self._nodes)[0])
        elif op == "call_function":
            function = decode_target(target, self._namespaces)
            _check_arguments(function, args, kwargs)
            node = self._graph.create_node(
                op,
                function,
                tuple(decode_value(argument, self._nodes) for argument in args),
                {key: decode_value(value, self._nodes) for key, value in kwargs.items()},
                name=name,
            )
        else:
            raise ArtifactError(f"graph.json has a node of the kind {str(op)[:40]!r}; do not trust this file")
        node.name = name  # fx renames what shadows a builtin, and the signature refers to nodes by name
        return node

    def _metadata(self, data: dict[str, Any]) -> dict[str, Any]:
        text = self._strings
        metadata: dict[str, Any] = {}
        if "stack_trace" in data:
            metadata["stack_trace"] = text[data["stack_trace"]]
        if "provenance" in data:
            metadata["provenance"] = tuple(text[index] for index in data["provenance"])
        if "nn_module_stack" in data:
            metadata["nn_module_stack"] = {
                text[key]: (text[path], text[kind]) for key, path, kind in data["nn_module_stack"]
            }
        return metadata


def _check_name(name: Any, taken: Collection[str]) -> None:
    """Names end up in the Python source that fx generates, so nothing but a plain identifier may pass."""
    if not isinstance(name, str) or not name.isidentifier() or not name.isascii() or keyword.iskeyword(name):
        raise ArtifactError(f"graph.json names a node {str(name)[:80]!r}; do not trust this file")
    if name in taken:
        raise ArtifactError(f"graph.json has two nodes named {name}; save the model again")


def _check_arguments(function: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    """An operator gets the arguments that its schema has, and all that it needs."""
    schema = list(function._schema.arguments) if isinstance(function, OpOverload) else []
    known = {argument.name for argument in schema}
    for key in kwargs:
        if key not in known:
            raise ArtifactError(f"graph.json passes {key[:80]!r} to {function}, which has no such argument")
    if not isinstance(function, OpOverload):
        return
    positional = [argument.name for argument in schema if not argument.kwarg_only]
    given = {*positional[: len(args)], *kwargs}
    absent = [argument.name for argument in schema if not argument.has_default_value() and argument.name not in given]
    if len(args) > len(positional) or absent:
        what = f"does not pass {absent[0]!r}" if absent else "passes too many arguments"
        raise ArtifactError(f"graph.json {what} to {function}; save the model again")


def _check_signature(graph: fx.Graph, signature: ExportGraphSignature, weights: WeightStore) -> None:
    """Every placeholder is one input, every output has one meaning, every weight is stored."""
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    named = [spec.arg.name for spec in signature.input_specs]
    if sorted(named) != sorted(placeholders):
        raise ArtifactError("graph.json's inputs are not those of its graph; save the model again")
    results = graph.output_node().args[0]
    if not isinstance(results, (list, tuple)) or len(results) != len(signature.output_specs):
        raise ArtifactError("graph.json's outputs are not those of its graph; save the model again")
    targets = [spec.target for spec in signature.input_specs]
    for target in targets + [result.target for result in signature.output_specs]:
        if target is not None and target not in weights:
            raise ArtifactError(f"graph.json reads the weight {target!r}, which is not stored; save it again")


def _check_weights(graph: fx.Graph, signature: ExportGraphSignature, weights: WeightStore, fakes: FakeReader) -> None:
    """Every weight has the shape and element type that the graph expects."""
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for spec in signature.input_specs:
        if spec.target is not None:
            expected = placeholders[spec.arg.name].meta["val"]
            with fakes.mode:
                found = weights.get(spec.target, lambda w: fakes.mode.from_tensor(w.detach(), static_shapes=True))
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise ArtifactError(
                    f"the weight {spec.target!r} is {list(found.shape)} of {found.dtype}, and graph.json expects "
                    f"{list(expected.shape)} of {expected.dtype}; save the model again"
                )
