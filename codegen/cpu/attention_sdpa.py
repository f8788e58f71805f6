"""Lowering attention to PyTorch's flash kernel, and to the definition where no kernel can express a site.

A causal mask over equal lengths is the kernel's flag. Any other mask becomes one additive tensor, built once a call
for all layers that share it, or once for all where constants alone decide it and it is not large. Sinks are applied
afterwards, from the log-sum-exp that the kernel returns: a logit ``s`` that takes weight and gives nothing scales a
row's output by ``sigmoid(lse - s)``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.attention_masks import (
    absorbs,
    additive_mask,
    fixed_sizes,
    gets_no_weight,
    is_flag,
    key_length,
    mask_key,
    without_keys,
)
from regraft.codegen.cpu.context import Context
from regraft.ir.mask import (
    Predicate,
    every_row_nonempty,
    parse,
    proof_lengths,
)
from regraft.ir.nodes import dtype, shape, size_equal
from regraft.ir.ops.attention import reference

aten = torch.ops.aten

_LARGEST_KNOWN = 1 << 24  # scores of all heads, whose mask is kept where constants alone decide it


def empty_rows(mask: Tensor | None) -> Tensor | None:
    """The rows ``[batch or 1, heads or 1, length, 1]`` that an additive mask leaves without a key; None for none."""
    if mask is None:
        return None
    empty = (mask == -math.inf).all(-1, keepdim=True)
    return empty if bool(empty.any()) else None


def fill_rows(out: Tensor, rows: Tensor | None, number: float) -> Tensor:
    """``out`` with ``number`` in ``rows``: zero, as PyTorch's attention defines it, or NaN, as a softmax does."""
    return out if rows is None else out.masked_fill(rows, number)


def uniform_rows(out: Tensor, rows: Tensor | None, value: Tensor) -> Tensor:
    """``out`` with the mean of all values in ``rows``, as a softmax of equal numbers gives it; ``value`` is
    ``[batch, kv_heads, keys, value_dim]``."""
    if rows is None:
        return out
    mean = value.mean(-2, keepdim=True).repeat_interleave(out.shape[1] // value.shape[1], 1)
    return torch.where(rows, mean, out)


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """``out`` ``[batch, heads, length, value_dim]`` after the sink took its share; ``lse`` is the log-sum-exp
    ``[batch, heads, length]``."""
    kept = torch.sigmoid(lse - sinks.to(lse.dtype).reshape(1, -1, 1))
    return out * kept.unsqueeze(-1).to(out.dtype)


def attend_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, grouped: bool
) -> Tensor:
    """PyTorch's attention; ``mask`` is additive, ``causal`` its own flag."""
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped
    )


def lower_sdpa(context: Context, given: dict[str, Any], attend: Callable[..., Tensor] = attend_sdpa) -> fx.Node:
    """Emit one attention site on PyTorch's kernel; ``attend`` may be ``attend_sdpa`` with a back end of its own, where
    the site has no sinks."""
    query, key, value = (context.value(given[name]) for name in ("query", "key", "value"))
    if given["sinks"] is not None:
        return _lower_with_sinks(context, given, query, key, value)
    grouped = not size_equal(shape(given["query"])[1], shape(given["key"])[1])
    mask: fx.Node | None = None
    causal: fx.Node | bool = False
    if _flag(given, parse(given["mask"])) == "causal":
        causal = True
    elif _has_mask(given):
        mask, causal = _mask_nodes(context, given, query)
    out = context.call(attend, query, key, value, mask, causal, given["scale"], grouped)
    return _settle_empty_rows(context, given, out, mask, value)


def sdpa_can(given: dict[str, Any]) -> bool:
    """Whether the flash kernel can express a site: of one floating type. Sinks need its log-sum-exp, which it returns
    for equal head dims only; in low precision they would round the output twice. A mask value that keeps some weight
    is no mask."""
    kinds, fill = {dtype(given[name]) for name in ("query", "key", "value")}, given["mask_fill"]
    if len(kinds) > 1 or not kinds.pop().is_floating_point:
        return False
    if given["softcap"] or (fill is not None and not gets_no_weight(fill)):
        return False
    if given["sinks"] is None:
        return True
    same_width = size_equal(shape(given["query"])[-1], shape(given["value"])[-1])
    return same_width and dtype(given["query"]) == torch.float32


def has_flag(given: dict[str, Any]) -> bool:
    """Whether the flash kernel needs no mask tensor for a site."""
    return given["sinks"] is None and _flag(given, parse(given["mask"])) is not None


def _has_mask(given: dict[str, Any]) -> bool:
    return given["mask"] != "all" or given["bias"] is not None or given["slopes"] is not None


def _flag(given: dict[str, Any], predicate: Predicate) -> str | None:
    """ "none" or "causal" when a predicate needs no mask tensor, else None."""
    if given["bias"] is not None or given["slopes"] is not None:
        return None
    return is_flag(predicate, shape(given["query"])[-2], shape(given["key"])[-2])


def _mask_nodes(context: Context, given: dict[str, Any], query: fx.Node) -> tuple[fx.Node, fx.Node | bool]:
    """The mask of a site, and its causal flag.

    Where the mask would be a mere flag but for padded keys, the keys are looked at in each call: a batch without
    padding takes the faster path.
    """
    rest = without_keys(parse(given["mask"]))
    flag = None if rest is None else _flag(given, rest)
    if flag is None:
        return _mask_node(context, given, query), False
    tensors = given["mask_tensors"]
    padded = context.shared(
        ("padded", tuple(tensors)), lambda: context.call(any_padding, [context.value(tensor) for tensor in tensors])
    )
    mask = _mask_node(context, given, query, padded)
    return mask, context.call(operator.not_, padded) if flag == "causal" else False


def any_padding(keys: list[Tensor]) -> bool:
    """Whether any key is masked by one of the padding masks ``[batch, keys]``."""
    return not all(bool(mask.all()) for mask in keys)


def _mask_node(context: Context, given: dict[str, Any], query: fx.Node, padded: fx.Node | bool = True) -> fx.Node:
    """The additive mask of a site; sites with equal masks, inputs and lengths share it."""
    tensors = tuple(given["mask_tensors"])

    def make() -> fx.Node:
        bias, slopes = (None if given[name] is None else context.value(given[name]) for name in ("bias", "slopes"))
        fill = given["mask_fill"] if absorbs(given["mask_fill"]) else -math.inf
        length = key_length(context, given)
        known = _known_mask(context, given, fill) if padded is True and bias is None and slopes is None else None
        if known is not None:
            return context.bind(known, "mask")
        values = [context.value(tensor) for tensor in tensors]
        if padded is True:
            return context.call(additive_mask, given["mask"], values, bias, slopes, query, length, fill)
        return context.call(mask_if, padded, given["mask"], values, query, length, fill)

    node: fx.Node = context.shared(("mask", mask_key(given), padded), make)
    return node


def _known_mask(context: Context, given: dict[str, Any], fill: float) -> Tensor | None:
    """The mask of a site that constants alone decide, made now; None for any other, and for one of many scores."""
    query, sizes = given["query"], fixed_sizes(given)
    if sizes is None or math.prod(sizes) > _LARGEST_KNOWN:
        return None
    if not all(context.is_weight(node) for node in given["mask_tensors"]):
        return None
    heads, length, keys = sizes
    tensors = [context.weight(node) for node in given["mask_tensors"]]
    rows = torch.empty(1, dtype=dtype(query), device=query.meta["val"].device).expand(1, heads, length, 1)
    return additive_mask(given["mask"], tensors, None, None, rows, keys, fill)


def mask_if(
    padded: bool, text: str, tensors: list[Tensor], query: Tensor, key_length: int, fill: float
) -> Tensor | None:
    """The additive mask, or None when no key is padded."""
    return additive_mask(text, tensors, None, None, query, key_length, fill) if padded else None


def _settle_empty_rows(
    context: Context, given: dict[str, Any], out: fx.Node, mask: fx.Node | None, value: fx.Node
) -> fx.Node:
    """What a row without keys gives: only asked where the mask or a bias may remove keys and no proof says that none
    is empty. Sites with equal masks look for such rows once."""
    if mask is None or absorbs(given["mask_fill"]):
        return out
    if given["mask"] == "all":
        if given["empty_rows"] == "zero":  # a bias of minus infinities: PyTorch's attention settles it itself
            return out
    elif every_row_nonempty(parse(given["mask"]), *_lengths(given)) and given["bias"] is None:
        return out
    rows = context.shared(("empty rows", mask), lambda: context.call(empty_rows, mask))
    if given["mask_fill"] is not None:
        return context.call(uniform_rows, out, rows, value)
    return context.call(fill_rows, out, rows, 0.0 if given["empty_rows"] == "zero" else math.nan)


def _lengths(given: dict[str, Any]) -> tuple[Any, Any]:
    """The lengths of queries and keys, as proofs take them."""
    return proof_lengths(shape(given["query"])[-2], shape(given["key"])[-2])


def _lower_with_sinks(context: Context, given: dict[str, Any], query: fx.Node, key: fx.Node, value: fx.Node) -> fx.Node:
    heads, kv_heads = shape(given["query"])[1], shape(given["key"])[1]
    if not size_equal(heads, kv_heads):
        groups = heads // kv_heads
        key, value = (context.call(aten.repeat_interleave.self_int, part, groups, 1) for part in (key, value))
    mask = _mask_node(context, given, query) if _has_mask(given) else None
    both = context.call(
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        query, key, value, 0.0, False, attn_mask=mask, scale=given["scale"],
    )  # fmt: skip
    out, lse = (context.call(_item, both, place) for place in (0, 1))
    return context.call(apply_sinks, out, lse, context.value(given["sinks"]))


def _item(values: Any, place: int) -> Any:
    return values[place]


def lower_reference(context: Context, given: dict[str, Any]) -> fx.Node:
    """What no kernel expresses (softcap, a mask value that keeps some weight): the definition, op by op."""
    operands = [context.value(given[name]) for name in ("query", "key", "value")]
    optional = [None if given[name] is None else context.value(given[name]) for name in ("bias", "slopes", "sinks")]
    tensors = [context.value(tensor) for tensor in given["mask_tensors"]]
    options = [given[name] for name in ("scale", "mask", "mask_fill", "empty_rows", "softcap")]
    return context.call(reference, *operands, tensors, *optional, *options)
