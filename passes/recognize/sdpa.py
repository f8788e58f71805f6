"""PyTorch's scaled_dot_product_attention becomes the attention operator: mask as a predicate, heads unrepeated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from regraft.ir.mask import CAUSAL
from regraft.ir.nodes import Builder, arguments, concrete, is_tensor, rank, shape
from regraft.ir.pattern import Call
from regraft.ir.pattern import sdpa as sdpa_call
from regraft.ir.rule import Match, Replacement, Requirement, Rule, need
from regraft.passes.recognize import attention_examples as shown
from regraft.passes.recognize.heads import Heads, build_attention
from regraft.passes.recognize.leading import read_leading
from regraft.passes.recognize.masks import Masks, read_masks
from regraft.passes.recognize.scores import Addition, Condition, Refused, Scores


class RecognizeSdpa(Rule):
    """scaled_dot_product_attention with a boolean, additive or causal mask, grouped queries included."""

    recognizes = "attention"
    landmark = "call"
    examples = shown.SDPA
    near_misses = shown.SDPA_NEAR_MISSES

    def pattern(self) -> Any:
        return Call(sdpa_call.targets, loose=True, name="call")

    def check(self, match: Match) -> Iterator[Requirement]:
        given = arguments(match.root)
        yield need(given["dropout_p"] == 0, "dropout is on", at=match.root)
        yield need(rank(given["query"]) in (3, 4, 5), "the query has neither 3, 4 nor 5 dims", at=match.root)
        try:
            match.facts["site"] = _read(match, given)
        except Refused as refused:
            yield need(False, refused.reason, at=refused.node or match.root)

    def replace(self, match: Match, build: Builder) -> Replacement:
        heads, scores, masks = match.facts["site"]
        return build_attention(build, match.root, heads, scores, masks, empty_rows="zero")


def _read(match: Match, given: dict[str, Any]) -> tuple[Heads, Scores, Masks]:
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    scale = given["scale"]
    if scale is None:
        scale = 1 / math.sqrt(concrete(shape(query)[-1]))
    if isinstance(scale, fx.Node):
        raise Refused("the scale is computed at run time", match.root)
    scores = Scores(scale=scale, site=match.root)
    lengths = shape(query)[-2], shape(key)[-2]
    if mask is not None and is_tensor(mask):
        if mask.meta["val"].dtype.is_floating_point:
            scores.maskings.append(Addition(mask))
        else:
            scores.maskings.append(Condition(mask, -math.inf, False, query.meta["val"].dtype))
    leading = read_leading(match.root, scores.maskings)
    masks = read_masks(match.program, scores, *lengths)
    if given["is_causal"]:
        masks.predicate = CAUSAL
    return Heads(query, key, False, value, leading, match.root, match.root), scores, masks
