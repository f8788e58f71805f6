"""Export a small mask builder and compare the recognised form with running it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from regraft.ir.mask import Alibi, MaskForm, Refusal, TensorBias, recognize_mask, to_dense

CONSTANT = "test_constant"


class Builder(torch.nn.Module):
    """A module which returns the mask that ``build`` makes; only its shapes are those of attention."""

    def __init__(self, build: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.build = build

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.build(*inputs)


def export(
    build: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], dynamic: bool
) -> tuple[torch.fx.Graph, Node]:
    shapes = None
    if dynamic:
        length = torch.export.Dim("length", min=2, max=512)
        probe = inputs[0].shape[-1]
        found = [{dim: length for dim, extent in enumerate(item.shape) if extent == probe} for item in inputs]
        shapes = (tuple(found),)
    program = torch.export.export(Builder(build), inputs, dynamic_shapes=shapes, strict=False)
    for spec in program.graph_signature.input_specs:
        if spec.kind == torch.export.graph_signature.InputKind.CONSTANT_TENSOR:
            holder = next(node for node in program.graph.nodes if node.name == spec.arg.name)
            holder.meta[CONSTANT] = program.constants[spec.target]
    output = next(iter(reversed(program.graph.nodes))).args[0][-1]
    return program.graph, output


def recognize(
    build: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], dynamic: bool = False
) -> tuple[MaskForm, torch.Tensor, torch.Tensor]:
    """(form, its tensor, the tensor of running the builder), both expanded."""
    graph, node = export(build, inputs, dynamic)
    shape = node.meta["val"].shape
    form = recognize_mask(node, shape[-2], shape[-1])
    assert not isinstance(form, Refusal), form.reason
    want = build(*inputs)
    return form, rebuild(graph, form, inputs, want), want


def rebuild(
    graph: torch.fx.Graph, form: MaskForm, inputs: tuple[torch.Tensor, ...], want: torch.Tensor
) -> torch.Tensor:
    """The tensor which a form means, its tensor operands computed by running the graph."""
    values = run_nodes(graph, inputs)
    full = (1,) * (4 - want.dim()) + tuple(want.shape)
    tensors = [values[node] for node in form.tensors]
    dense = to_dense(form.predicate, tensors, *full).reshape(want.shape)
    if form.dtype == torch.bool:
        return dense
    bias = torch.zeros((), dtype=form.dtype)
    if isinstance(form.bias, TensorBias):
        bias = values[form.bias.node]
    elif isinstance(form.bias, Alibi):
        names = {"query_len": full[2], "key_len": full[3]}
        offset = form.bias.offset.evaluate(names)
        query, key = torch.arange(full[2])[:, None], torch.arange(full[3])
        place = {
            "key": key + offset,
            "relative": key - query + offset,
            "distance": (key - query + offset).abs(),
        }
        bias = form.bias.scale * values[form.bias.slopes].reshape(-1, 1, 1) * place[form.bias.position]
    if form.fill is None:
        return bias.expand(want.shape).to(form.dtype)
    fill = torch.tensor(form.fill, dtype=form.dtype)
    if form.combine == "replace":
        return torch.where(dense, bias, fill)
    return bias + torch.where(dense, torch.zeros((), dtype=form.dtype), fill)


def run_nodes(graph: torch.fx.Graph, inputs: tuple[torch.Tensor, ...]) -> dict[Node, torch.Tensor]:
    values: dict[Node, torch.Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: Node) -> torch.Tensor:
            result = super().run_node(n)
            values[n] = result  # not a copy: what a reader at the end of the graph sees
            return result

    constants = [node.meta[CONSTANT] for node in graph.nodes if CONSTANT in node.meta]
    Recorder(torch.fx.GraphModule({}, graph)).run(*constants, *inputs)
    return dict(zip(graph.nodes, values.values(), strict=True))
