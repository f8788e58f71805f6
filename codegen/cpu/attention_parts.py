"""Masks as the native attention kernel takes them apart: what it can skip, what it must add.

The conjuncts of a site's mask become a few spans of keys per row and head where they are bands, prefixes, chunks,
lengths, and unions of them; documents and trees too, when their tensors are at hand and make them so. Padding is one
row of numbers a batch, and the rest one bit for each score, evaluated from what the mask is said of
(``native/mask.cpp``), once a call for all sites that share it.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.attention_masks import (
    additive_mask,
    conjunction,
    fixed_sizes,
    heads_and_length,
    key_length,
    mask_key,
    parsed,
)
from regraft.codegen.cpu.context import Context
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native.mask import mask_bits
from regraft.ir.mask import (
    MOST_SPANS,
    And,
    Everything,
    Keys,
    Predicate,
    has_spans,
    most_spans,
    parse,
    spans,
    to_broadcast,
)
from regraft.ir.mask.predicate import tensors_of
from regraft.ir.nodes import concrete, dtype, shape, size_equal

_LOG = logging.getLogger("regraft")
_LARGEST_CONSTANT = 1 << 26  # elements of a mask that is looked at when a model is lowered

#: Intervals a row of a part of a mask that is read in every call: meeting more with others costs more than bits.
_WORTH_MEETING = 4 * MOST_SPANS


@dataclass(frozen=True)
class Parts:
    """A mask as the kernel takes it: what is a few spans of keys a row by its form, or by constants that were looked at
    (``known``), what a tensor may make so (packed documents, ancestors in a tree), padding, and the rest."""

    spans: Predicate
    known: Predicate
    runs: Predicate
    keys: Predicate
    rest: Predicate


def take_apart(context: Context, given: dict[str, Any]) -> Parts:
    """The parts of a site's mask."""
    predicate = parse(given["mask"])
    if given["bias"] is not None and given.get("mask_fill") is not None:
        # The number takes the bias's place, and may take weight.
        return Parts(Everything(), Everything(), Everything(), Everything(), predicate)
    conjuncts = predicate.operands if isinstance(predicate, And) else (predicate,)
    constants = {n for n, tensor in enumerate(given["mask_tensors"]) if _is_constant(context, tensor)}
    conditions = [n for n, tensor in enumerate(given["mask_tensors"]) if _is_condition(tensor)]
    seen: list[Predicate] = []
    known: list[Predicate] = []
    runs: list[Predicate] = []
    keys: list[Predicate] = []
    rest: list[Predicate] = []
    for part in conjuncts:
        if isinstance(part, Keys):
            keys.append(part)
        elif most_spans(conjunction([*seen, part]), conditions) <= MOST_SPANS:
            seen.append(part)
        elif tensors_of(part) <= constants and fixed_sizes(given) is not None:
            known.append(part)
        elif has_spans(part, conditions):
            runs.append(part)
        else:
            rest.append(part)
    if known and _known_table(context, given, conjunction(seen), conjunction(known)) is None:
        rest, known = rest + known, []
    if _is_large(given["bias"]):  # nothing is added to it that bits can say
        rest, keys = rest + keys, []
    if rest:  # there are bits anyway
        rest, runs = rest + runs, []
    return Parts(*map(conjunction, (seen, known, runs, keys, rest)))


def _is_constant(context: Context, tensor: fx.Node) -> bool:
    return context.is_weight(tensor) and math.prod(map(concrete, shape(tensor))) <= _LARGEST_CONSTANT


def _is_condition(tensor: fx.Node) -> bool:
    """Whether a tensor says the same of all keys of a row."""
    return len(shape(tensor)) > 0 and size_equal(shape(tensor)[-1], 1)


def _known_table(context: Context, given: dict[str, Any], seen: Predicate, known: Predicate) -> Tensor | None:
    """The spans of a mask that is known now, constants included; None where they are many, or tensors are unknown."""
    sizes, both = fixed_sizes(given), conjunction([seen, known])
    nodes = given["mask_tensors"]
    if sizes is None or any(not _is_constant(context, nodes[number]) for number in tensors_of(both)):
        return None

    def make() -> Tensor | None:
        return spans(both, *sizes, _constants(context, nodes), dense=True)

    table: Tensor | None = context.shared(("known spans", str(both), tuple(nodes), sizes), make)
    return table


def _constants(context: Context, nodes: list[fx.Node]) -> list[Tensor]:
    """What a mask reads, as far as it is constant; something in place of what is not."""
    return [
        context.weight(node) if _is_constant(context, node) else torch.zeros(1, dtype=torch.float32) for node in nodes
    ]


def _is_large(bias: fx.Node | None) -> bool:
    """Whether a bias differs from row to row."""
    return bias is not None and len(shape(bias)) > 1 and not size_equal(shape(bias)[-2], 1)


@dataclass(frozen=True)
class MaskNodes:
    """A mask in the lowered graph, as the kernel takes it: what is added to the scores, the spans of keys that rows
    see, and bits that say which of these are seen in truth. None for nothing, for all keys, for all of them."""

    added: fx.Node | None
    spans: fx.Node | None
    bits: fx.Node | None


def mask_nodes(context: Context, given: dict[str, Any], parts: Parts) -> MaskNodes:
    """The mask of a site; sites with equal masks share its tensors."""
    keys = key_length(context, given)
    sizes = *heads_and_length(context, given), keys
    tensors = [context.value(tensor) for tensor in given["mask_tensors"]]
    added = _added_node(context, given, parts, keys, tensors)
    if not isinstance(parts.runs, Everything):
        texts = str(conjunction([parts.spans, parts.known])), str(parts.runs)
        both = context.shared(
            ("spans or bits", texts, mask_key(given)),
            lambda: context.call(spans_or_bits, *texts, tensors, *sizes),
        )
        return MaskNodes(added, _item(context, both, 0), _item(context, both, 1))
    seen = _span_node(context, given, parts, sizes, tensors)
    return MaskNodes(added, seen, None if _fills(given) else _bits_node(context, given, parts, sizes, tensors))


def widened(context: Context, node: fx.Node) -> fx.Node:
    """A floating tensor in fp32."""
    if dtype(node) == torch.float32:
        return context.value(node)
    made: fx.Node = context.shared(
        ("in fp32", node),
        lambda: context.call(torch.ops.aten._to_copy.default, context.value(node), dtype=torch.float32),
    )
    return made


def _item(context: Context, pair: fx.Node, place: int) -> fx.Node:
    node: fx.Node = context.shared((place, "of", pair), lambda: context.call(operator.getitem, pair, place))
    return node


def _fills(given: dict[str, Any]) -> bool:
    """Whether a number takes a bias's place, and may take weight: the mask is then part of what is added."""
    return given["bias"] is not None and given.get("mask_fill") is not None


def _added_node(
    context: Context, given: dict[str, Any], parts: Parts, keys: fx.Node | int, tensors: list[fx.Node]
) -> fx.Node | None:
    """The bias and what hides keys from all rows alike."""
    hidden = parts.rest if _fills(given) else parts.keys
    text = str(hidden)
    if given["bias"] is not None:
        query, bias = widened(context, given["query"]), widened(context, given["bias"])
        if isinstance(hidden, Everything):
            return bias  # the kernel spreads it
        fill = given["mask_fill"] if _fills(given) else -math.inf
        node: fx.Node = context.shared(
            ("native mask", text, mask_key(given)),
            lambda: context.call(score_mask, text, tensors, bias, query, keys, fill),
        )
        return node
    if isinstance(hidden, Everything):
        return None
    found: fx.Node = context.shared(
        ("native keys", text, mask_key(given)), lambda: context.call(padding_mask, text, tensors, keys)
    )
    return found


def score_mask(text: str, tensors: list[Tensor], bias: Tensor, query: Tensor, keys: int, fill: float) -> Tensor:
    """A bias, and ``fill`` where the predicate does not hold; of the size of the scores only where rows differ."""
    return additive_mask(text, tensors, bias, None, query, keys, fill)


def padding_mask(text: str, tensors: list[Tensor], keys: int) -> Tensor | None:
    """``[batch or 1, 1, 1, keys]``: minus infinity at padded keys; None in a batch without any."""
    seen = to_broadcast(parsed(text), tensors, 1, 1, keys)
    if bool(seen.all()):
        return None
    return torch.zeros(seen.shape, dtype=torch.float32).masked_fill_(~seen, -math.inf)


def _span_node(
    context: Context, given: dict[str, Any], parts: Parts, sizes: tuple[fx.Node | int, ...], tensors: list[fx.Node]
) -> fx.Node | None:
    """Made now where nothing is unknown, else in each call."""
    if isinstance(parts.spans, Everything) and isinstance(parts.known, Everything):
        return None
    table = _known_table(context, given, parts.spans, parts.known)
    if table is not None:
        return context.bind(table, "spans")
    text = str(parts.spans)
    node: fx.Node = context.shared(
        ("span call", text, mask_key(given)), lambda: context.call(span_table, text, tensors, *sizes)
    )
    return node


def span_table(text: str, tensors: list[Tensor], heads: int, length: int, keys: int) -> Tensor:
    """Where the intervals of keys that each row sees start and end: ``[2, batch or 1, heads or 1, length, count]``."""
    found = spans(parsed(text), heads, length, keys, tensors)
    assert found is not None  # by the form of the predicate
    return found


def _bits_node(
    context: Context, given: dict[str, Any], parts: Parts, sizes: tuple[fx.Node | int, ...], tensors: list[fx.Node]
) -> fx.Node | None:
    """Made now where constants alone decide them, else in each call."""
    if isinstance(parts.rest, Everything):
        return None
    text, nodes, fixed = str(parts.rest), given["mask_tensors"], fixed_sizes(given)
    if fixed is not None and all(_is_constant(context, nodes[number]) for number in tensors_of(parts.rest)):
        held = fixed

        def make() -> Tensor:
            return mask_bits(NATIVE.library(), parts.rest, _constants(context, nodes), *held)

        return context.bind(context.shared(("known bits", text, tuple(nodes), fixed), make), "bits")
    node: fx.Node = context.shared(
        ("bits call", text, mask_key(given)), lambda: context.call(bits_of, text, tensors, *sizes)
    )
    return node


def bits_of(text: str, tensors: list[Tensor], heads: int, length: int, keys: int) -> Tensor:
    """The bits of a call."""
    return mask_bits(NATIVE.library(), parsed(text), tensors, heads, length, keys)


def spans_or_bits(
    seen: str, runs: str, tensors: list[Tensor], heads: int, length: int, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """The spans of a call where its tensors make ``runs`` a few; else those of ``seen``, and bits for ``runs``."""
    both = conjunction([parsed(seen), parsed(runs)])
    found = spans(both, heads, length, keys, tensors, dense=True, limit=_WORTH_MEETING)
    if found is not None:
        return found, None
    _say_bits(runs)
    table = None if seen == "all" else spans(parsed(seen), heads, length, keys, tensors, dense=True)
    return table, bits_of(runs, tensors, heads, length, keys)


@functools.lru_cache(maxsize=256)
def _say_bits(text: str) -> None:
    _LOG.info("the mask %s has rows with more than %d runs of keys: it is one bit for each score", text, MOST_SPANS)
