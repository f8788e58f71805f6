"""In-place operators on tensors that nothing else looks at become functional where they stand.

``run_decompositions`` does that for any graph, by tracing it anew, which takes longer than the export. Most models need
it for little: a division of routing weights, an activation in place, numbers put into a new tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensor

from regraft.ir.capture_regions import value_of
from regraft.ir.nodes import arguments, is_view, sizes_equal

_ATEN = torch.ops.aten
#: Operators that are written in terms of others and still never return what they were given, as such ones may.
_MAKES_NEW = frozenset(
    {
        _ATEN.linear.default,
        _ATEN.matmul.default,
        _ATEN.conv1d.default,
        _ATEN.conv2d.default,
        _ATEN.conv3d.default,
        _ATEN.batch_norm.default,
        _ATEN.group_norm.default,
        _ATEN.layer_norm.default,
        _ATEN.rms_norm.default,
        _ATEN.softmax.int,
        _ATEN.scaled_dot_product_attention.default,
    }
)
_UNLIKE = frozenset({torch.Tag.inplace_view, torch.Tag.nondeterministic_seeded})
_COPIES = frozenset({_ATEN.copy_.default})  # whose functional form is no operator that models have


_DROPOUTS = frozenset(
    {
        _ATEN.dropout.default,
        _ATEN.alpha_dropout.default,
        _ATEN.feature_dropout.default,
        _ATEN.feature_alpha_dropout.default,
    }
)


def write_functional(graph: fx.Graph) -> None:
    """Replace in place what can be; everything else is left as it is, but for dropouts that drop nothing: they return
    their operand itself, which ``run_decompositions`` takes for a copy that later writes do not reach. The signature of
    an exported program names what it returns, so that this stays."""
    for node in list(graph.nodes):
        returned = any(user.op == "output" for user in node.users)
        if node.target in _DROPOUTS and not returned and not arguments(node)["train"]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        functional, before = _functional_form(node), node.meta.get("val")
        if functional is None or not isinstance(before, FakeTensor) or not _alone(node, order):
            continue
        in_place, node.target = node.target, functional
        value = value_of(node, before.fake_mode)
        if not _lies_alike(value, before):
            node.target = in_place
            continue
        written = node.args[0]
        node.meta["val"] = value
        written.replace_all_uses_with(node, lambda user, place=order[node]: order[user] > place)


def _functional_form(node: fx.Node) -> OpOverload | None:
    """The operator that computes what ``node`` writes to its first operand; None where there is none."""
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "aten" or target in _COPIES:
        return None
    written, *others = [argument.alias_info for argument in target._schema.arguments] or [None]
    writes_first = written is not None and written.is_write and all(alias is None for alias in others)
    name = target._schema.name.partition("::")[2]
    if not writes_first or not name.endswith("_") or not _UNLIKE.isdisjoint(target.tags):
        return None
    form = getattr(getattr(_ATEN, name[:-1], None), target._overloadname, None)
    if form is None or form._schema.is_mutable or len(form._schema.returns) != 1:
        return None
    names = [[argument.name for argument in each._schema.arguments] for each in (target, form)]
    return form if names[0] == names[1] else None


def _alone(node: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether no tensor shares memory with the one that ``node`` writes to, and the program does not return it."""
    written = node.args[0]
    if not isinstance(written, fx.Node) or not _is_own(written):
        return False
    before = [user for user in written.users if order[user] < order[node]]
    return all(user.op != "output" for user in written.users) and all(map(_makes_new, before))


def _is_own(node: fx.Node) -> bool:
    """Whether a node is the only one for memory that its call made."""
    if node.target is not operator.getitem:
        return _makes_new(node)
    source, place = node.args
    assert isinstance(source, fx.Node)
    others = [user for user in source.users if user is not node]
    apart = all(user.target is operator.getitem and user.args[1] != place for user in others)
    return apart and _makes_new(source)


def _makes_new(node: fx.Node) -> bool:
    """Whether a call never returns memory of an operand."""
    target = node.target
    if not isinstance(target, OpOverload) or is_view(node):
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return not composite or target in _MAKES_NEW


def _lies_alike(value: Any, before: FakeTensor) -> bool:
    """Whether two results are of one type, size and layout: what reads the one can read the other."""
    if not isinstance(value, FakeTensor) or (value.dtype, value.device) != (before.dtype, before.device):
        return False
    return sizes_equal(value.shape, before.shape) and sizes_equal(value.stride(), before.stride())
