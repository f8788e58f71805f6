"""Where the experts of a checkpoint lie, and its routers: found by structure, for any model's names.

An expert layer is what holds a module ``experts``: either ``<block>.experts.<number>.<rest>``, or tensors
``<block>.experts.<rest>`` that are stacked on their first dim. The router is the part of the same block whose tensors
all have an entry for each expert, one of them ``[experts, hidden]``; biases and correction vectors are ``[experts]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from regraft.checkpoint.shards import Stored
from regraft.passes.experts.errors import PermutationError

_INTEGERS = ("I", "U", "BOOL")


@dataclass
class ExpertLayer:
    """One block. ``numbered[rest][number]`` is a tensor of one expert; ``stacked`` hold all experts' on the first dim;
    ``rows`` are the router's tensors."""

    block: str
    layer: int
    numbered: dict[str, dict[int, Stored]] = field(default_factory=dict)
    stacked: list[Stored] = field(default_factory=list)
    rows: list[Stored] = field(default_factory=list)


def find_layers(tensors: Iterable[Stored], experts: int, hidden: int) -> list[ExpertLayer]:
    """The expert layers of a checkpoint, by their number. Raises ``PermutationError`` for what is not understood."""
    held = list(tensors)
    layers: dict[str, ExpertLayer] = {}
    for tensor in held:
        block, rest = _split(tensor.name)
        if rest:
            if block not in layers:
                layers[block] = ExpertLayer(block, _number(block))
            _enter(layers[block], tensor, rest)
    if not layers:
        raise PermutationError("the checkpoint has no tensor of a module called 'experts'; expected routed experts")
    found = sorted(layers.values(), key=lambda layer: layer.layer)
    for one, other in pairwise(found):
        if one.layer == other.layer:
            raise PermutationError(
                f"{one.block} and {other.block} are both expert blocks of layer {one.layer}; expected one a layer"
            )
    if experts == hidden:
        raise PermutationError(
            f"the model has as many experts as hidden features ({experts}), so that the router's rows cannot be told "
            "from other weights by their shape; permute the graph of the model instead"
        )
    for layer in found:
        _check_experts(layer, experts)
        layer.rows = _router(layer, held, experts, hidden)
    return found


def _split(name: str) -> tuple[str, str]:
    """``(block, rest)`` of a tensor of experts; the rest is empty for any other tensor."""
    parts = name.split(".")
    at = parts.index("experts") if "experts" in parts[:-1] else -1
    return (".".join(parts[:at]), ".".join(parts[at + 1 :])) if at >= 0 else (name, "")


def _number(block: str) -> int:
    number = next((part for part in block.split(".") if part.isdecimal()), None)
    if number is None:
        raise PermutationError(f"the expert block {block!r} has no layer number in its name; expected one")
    return int(number)


def _enter(layer: ExpertLayer, tensor: Stored, rest: str) -> None:
    number, _, inner = rest.partition(".")
    if number.isdecimal() and inner:
        layer.numbered.setdefault(inner, {})[int(number)] = tensor
    else:
        layer.stacked.append(tensor)


def _check_experts(layer: ExpertLayer, experts: int) -> None:
    for rest, copies in layer.numbered.items():
        if sorted(copies) != list(range(experts)):
            missing = next((number for number in range(experts) if number not in copies), max(copies))
            raise PermutationError(
                f"{layer.block}.experts holds {len(copies)} tensors {rest!r} where the config says {experts} experts "
                f"(see expert {missing}); complete the checkpoint"
            )
        if len({(tensor.dtype, tensor.shape) for tensor in copies.values()}) > 1:
            raise PermutationError(
                f"the experts of {layer.block} differ in shape or element type ({rest}); expected all alike"
            )
    kept = []
    for tensor in layer.stacked:
        if tensor.shape[:1] == (experts,) and tensor.nbytes % experts == 0:
            kept.append(tensor)
        elif len(tensor.shape) > 0 and tensor.shape != (1,):
            raise PermutationError(
                f"{tensor.name} has the shape {list(tensor.shape)}; expected {experts} experts on the first dim"
            )
    layer.stacked = kept


def _router(layer: ExpertLayer, tensors: list[Stored], experts: int, hidden: int) -> list[Stored]:
    """The tensors of the block outside its experts that have an entry for each expert."""
    children: dict[str, list[Stored]] = {}
    start = f"{layer.block}." if layer.block else ""
    for tensor in tensors:
        if tensor.name.startswith(start) and not _split(tensor.name)[1]:
            children.setdefault(tensor.name[len(start) :].partition(".")[0], []).append(tensor)
    rows = [
        tensor
        for child in children.values()
        if all(_has_entries(tensor, experts) or not tensor.shape for tensor in child)
        for tensor in child
        if tensor.shape
    ]
    products = [tensor.name for tensor in rows if tensor.shape == (experts, hidden)]
    if len(products) != 1:
        said = f"{len(products)} tensors of that shape ({', '.join(products)})" if products else "none"
        raise PermutationError(
            f"the router of {layer.block} is not understood: expected one part with a weight [{experts}, {hidden}] "
            f"whose tensors all have an entry for each expert, found {said}"
        )
    for tensor in (tensor for child in children.values() for tensor in child):
        if tensor.dtype.startswith(_INTEGERS) and tensor.shape not in ((), (1,)):
            raise PermutationError(
                f"{tensor.name} holds whole numbers beside the experts, which may name experts; it is not understood"
            )
    return rows


def _has_entries(tensor: Stored, experts: int) -> bool:
    """Whether the first dim that is not one has an entry for each expert."""
    sizes = list(tensor.shape)
    while len(sizes) > 1 and sizes[0] == 1:
        sizes.pop(0)
    return sizes[:1] == [experts]
