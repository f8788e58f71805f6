"""FlexAttention as a candidate: a site's predicate as its mask function, its block mask made once for all sites that
share the mask.

It is compiled by torch for one shape, so that only sites of fixed sizes take it; on a CPU it runs eagerly, as its
definition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx

from regraft.codegen.cpu.attention_masks import mask_key, parsed
from regraft.codegen.cpu.context import Context
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.mask_operands import atoms
from regraft.ir.mask import KEY_LENGTH, QUERY_LENGTH, Heads, Predicate
from regraft.ir.mask.predicate import (
    And,
    Band,
    Bits,
    Chunk,
    Dense,
    Everything,
    Keys,
    Lengths,
    Not,
    Nothing,
    Or,
    Prefix,
    Rows,
    Same,
    tensors_of,
)
from regraft.ir.nodes import shape

_SMALLEST_DIM = 16
_MOST_BLOCK_MASKS = 64
#: Whether a pair is visible: of batch, head, query and key, as FlexAttention gives them.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_refuses(spec: AttentionSpec, given: dict[str, Any]) -> str | None:
    """Why FlexAttention cannot run a site; None where it can. Of a row without keys it makes zeros."""
    if not spec.softmax or spec.sinks or spec.mask_fill is not None:
        return "it has no sinks, no weights other than a softmax, and no number at masked scores"
    if spec.empty_rows != "zero":
        return f"a row without keys is {spec.empty_rows} here, and zero there"
    if min(spec.head_dim, spec.value_dim) < _SMALLEST_DIM:
        return f"it takes heads of {_SMALLEST_DIM} numbers or more"
    if any(isinstance(atom, Bits) for atom in atoms([spec.predicate])):
        return "the mask reads bits of words"
    sizes = [size for name in ("query", "key") for size in shape(given[name])]
    if not all(isinstance(size, int) for size in sizes):
        return "its sizes are symbolic, and it would be compiled again for each"
    return None


def lower_flex(context: Context, given: dict[str, Any], spec: AttentionSpec) -> fx.Node:
    """Emit one site on FlexAttention."""
    query, key, value = (context.value(given[name]) for name in ("query", "key", "value"))
    bias, slopes = (None if given[name] is None else context.value(given[name]) for name in ("bias", "slopes"))
    blocks = None
    if not isinstance(spec.predicate, Everything):
        tensors = [context.value(tensor) for tensor in given["mask_tensors"]]
        blocks = context.shared(
            ("block mask", spec.mask, mask_key(given)),
            lambda: context.call(block_mask, spec.mask, tensors, query, key),
        )
    return context.call(
        attend_flex, query, key, value, blocks, spec.mask, bias, slopes, given["scale"], given["softcap"]
    )


def block_mask(text: str, tensors: list[Tensor], query: Tensor, key: Tensor) -> Any:
    """The block mask of a call. One that reads no tensor is kept for the calls that follow."""
    batch, heads, queries, keys = *query.shape[:3], key.shape[2]
    if not tensors_of(parsed(text)):
        return _kept_block_mask(text, heads, queries, keys, query.device)
    return _built(text, tensors, batch, heads, queries, keys, query.device)


@functools.lru_cache(maxsize=_MOST_BLOCK_MASKS)
def _kept_block_mask(text: str, heads: int, queries: int, keys: int, device: torch.device) -> Any:
    return _built(text, [], None, heads, queries, keys, device)


def _built(
    text: str, tensors: list[Tensor], batch: int | None, heads: int, queries: int, keys: int, device: torch.device
) -> Any:
    predicate = parsed(text)
    by_head = any(isinstance(atom, (Heads, Dense)) for atom in atoms([predicate]))
    rule = mask_rule(predicate, tensors, batch or 1, heads, queries, keys)
    build = _compiled("block_mask", text) if device.type == "cuda" else _make_block_mask
    return build(rule, batch, heads if by_head else None, queries, keys, str(device))


def _make_block_mask(rule: Rule, batch: int | None, heads: int | None, queries: int, keys: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(rule, batch, heads, queries, keys, device=device)


def attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Any,
    text: str,
    bias: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """FlexAttention with what changes scores: softcap, bias, slopes."""
    options = (text, bias is not None, slopes is not None, scale, softcap)
    attend = _compiled("attend", options) if query.is_cuda else _attend
    grouped = query.shape[1] != key.shape[1]
    if bias is not None:
        bias = bias.expand(*query.shape[:3], key.shape[2])
    if slopes is not None:
        slopes = slopes.reshape(-1)
    return attend(query, key, value, blocks, bias, slopes, scale, softcap, grouped)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Any,
    bias: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float,
    grouped: bool,
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def modified(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[b, h, q, k]
        return score if slopes is None else score + slopes[h] * (k - q)

    changes = modified if softcap or bias is not None or slopes is not None else None
    out = flex_attention(query, key, value, score_mod=changes, block_mask=blocks, scale=scale, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _compiled(what: str, options: Any) -> Callable[..., Any]:
    """A compiled function with code of its own: torch counts the variants of a function by its code, and beyond a
    limit would run all scores eagerly, without a word."""
    function: Any = {"attend": _attend, "block_mask": _make_block_mask}[what]
    name = f"{what}_{_compiled.cache_info().currsize}"
    own = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    return torch.compile(own, dynamic=False)


def mask_rule(predicate: Predicate, tensors: list[Tensor], batch: int, heads: int, queries: int, keys: int) -> Rule:
    """A predicate as FlexAttention's mask function; ``tensors`` are those that it reads."""
    sizes = {QUERY_LENGTH: queries, KEY_LENGTH: keys}

    def part(node: Predicate) -> Rule:
        return mask_rule(node, tensors, batch, heads, queries, keys)

    def table(number: int, length: int) -> Tensor:
        return tensors[number].reshape(-1, length).expand(batch, length)

    match predicate:
        case Everything():
            return lambda b, h, q, k: k >= 0
        case Nothing():
            return lambda b, h, q, k: k < 0
        case Band(lower, upper):
            least = -keys - queries if lower is None else lower.evaluate(sizes)
            most = keys + queries if upper is None else upper.evaluate(sizes)
            return lambda b, h, q, k: (k - q >= least) & (k - q <= most)
        case Prefix(length):
            end = length.evaluate(sizes)
            return lambda b, h, q, k: k < end
        case Chunk(size, offset):
            shift = offset.evaluate(sizes)
            return lambda b, h, q, k: (q + shift) // size == k // size
        case Heads(first, last):
            return lambda b, h, q, k: (h >= first) & (h < last)
        case Lengths(number):
            ends = table(number, 1)
            return lambda b, h, q, k: k < ends[b, 0]
        case Keys(number):
            present = table(number, keys)
            return lambda b, h, q, k: present[b, k] != 0
        case Rows(number):
            counted = table(number, queries)
            return lambda b, h, q, k: counted[b, q] != 0
        case Same(left, right):
            of_rows, of_keys = table(left, queries), table(right, keys)
            return lambda b, h, q, k: of_rows[b, q] == of_keys[b, k]
        case Dense(number):
            seen = tensors[number].expand(batch, heads, queries, keys)
            return lambda b, h, q, k: seen[b, h, q, k] != 0
        case Not(operand):
            inner = part(operand)
            return lambda b, h, q, k: ~inner(b, h, q, k)
        case And(operands):
            return _combined([part(operand) for operand in operands], torch.logical_and)
        case Or(operands):
            return _combined([part(operand) for operand in operands], torch.logical_or)
    raise TypeError(f"not a mask of pairs: {predicate!r}")


def _combined(rules: list[Rule], both: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    return lambda b, h, q, k: functools.reduce(both, [rule(b, h, q, k) for rule in rules])
