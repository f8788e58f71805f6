"""The masks of one attention site as one predicate, and what is added to the scores besides.

Several masks are one predicate only where they mean the same as one: all of them minus infinity, or no row without a
key, or one number written over another. Otherwise the whole chain of masks is kept as it is written, as a bias:
``finfo.min + finfo.min`` is minus infinity, so that a row with no key spreads its weight over the positions that one
mask alone hides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from regraft.ir.mask import (
    KEY_LENGTH,
    QUERY_LENGTH,
    Alibi,
    Everything,
    Interpreter,
    Length,
    MaskForm,
    Predicate,
    Refusal,
    TensorBias,
    every_row_nonempty,
    is_causal,
    proof_lengths,
    recognize_condition,
    recognize_mask,
    simplify,
)
from regraft.ir.mask.predicate import And, Dense, Not, renumber, tensors_of
from regraft.ir.nodes import rank
from regraft.ir.program import Program
from regraft.passes.recognize.hiding import may_hide
from regraft.passes.recognize.scores import Addition, Condition, Refused, Scores

aten = torch.ops.aten

#: A number this low, or lower, leaves no weight beside any key that is not masked, in fp32 and in bf16; added to a
#: score, it leaves nothing of it.
_NOTHING_LEFT = -1e30
_LARGEST_CONSTANT_MASK = 1 << 22  # elements; larger buffers are not read as masks


@dataclass
class Masks:
    """All masks of a site as one predicate, and what is added to the scores besides.

    ``chain`` are maskings that no predicate says: they are written out again, and their sum is a bias.
    """

    predicate: Predicate = field(default_factory=Everything)
    tensors: list[fx.Node] = field(default_factory=list)
    fill: float | None = None
    biases: list[Addition] = field(default_factory=list)
    slopes: tuple[fx.Node, float] | None = None
    chain: Sequence[Addition | Condition] = ()
    least: float = -math.inf


@dataclass(frozen=True)
class _Part:
    """One mask among several: its form, and the step of the source that it is."""

    form: MaskForm
    source: Addition | Condition

    @property
    def fill(self) -> float:
        """The number written where it masks."""
        return -math.inf if self.form.fill is None else self.form.fill


def read_masks(program: Program, scores: Scores, query_length: Any, key_length: Any) -> Masks:
    """One predicate for all additions and conditions; what is no mask stays a bias. Raises ``Refused``."""
    reader = _Reader(program, scores, query_length, key_length)
    masks = Masks()
    parts: list[_Part] = []
    for item in scores.maskings:
        part = reader.condition(item) if isinstance(item, Condition) else reader.addition(item, masks)
        if part is not None:
            parts.append(part)
    _conjoin(masks, parts, proof_lengths(query_length, key_length))
    hidden = any(may_hide(item.node, program) for item in masks.biases)
    fill = _common_fill(parts, masks.predicate, hidden, scores, proof_lengths(query_length, key_length))
    if fill is None:
        return _written_out(scores)
    masks.fill = None if fill == -math.inf else fill
    return masks


def _conjoin(masks: Masks, parts: list[_Part], lengths: tuple[Any, Any]) -> None:
    """And of all predicates, over the tensors of all."""
    predicates: list[Predicate] = []
    for part in parts:
        predicates.append(_shifted(part.form.predicate, len(masks.tensors)))
        masks.tensors += part.form.tensors
    if predicates:
        masks.predicate = predicates[0] if len(predicates) == 1 else simplify(And(tuple(predicates)), *lengths)


@dataclass(frozen=True)
class _Reader:
    """Reads the maskings of one site."""

    program: Program
    scores: Scores
    query_length: Any
    key_length: Any

    def addition(self, item: Addition, masks: Masks) -> _Part | None:
        """The mask that is added; None where it is a bias, which goes to ``masks``."""
        if item.within is not None:
            masks.biases.append(item)
            return None
        form = recognize_mask(item.node, self.query_length, self.key_length, interpreter_of(self.program))
        if isinstance(form, Refusal):
            raise Refused(f"what is added to the scores is no mask or bias: {form.reason}", item.node)
        plain = item.factor == 1 or form.fill in (None, -math.inf)
        if not (plain and _additive_is_exact(form) and _expressible(form) and _take_bias(masks, form, item.factor)):
            masks.biases.append(item)
            return None
        return None if isinstance(form.predicate, Everything) else _Part(form, item)

    def condition(self, item: Condition) -> _Part | None:
        """The mask that a number is written by; None where it hides nothing."""
        lengths = self.query_length, self.key_length
        form = recognize_condition(
            item.condition, item.fill, *lengths, item.dtype, item.masked_where_true, interpreter_of(self.program)
        )
        if isinstance(form, Refusal):
            raise Refused(f"the scores are masked by {form.reason}", item.condition)
        form = form if _expressible(form) else _dense(form, item.condition, item.masked_where_true)
        return None if isinstance(form.predicate, Everything) else _Part(form, item)


def _additive_is_exact(form: MaskForm) -> bool:
    """Adding minus infinity, or the lowest finite number, leaves nothing of the score, as replacing it does."""
    return form.fill is None or form.fill == -math.inf or form.fill == torch.finfo(form.dtype).min


def _take_bias(masks: Masks, form: MaskForm, factor: float) -> bool:
    """Take the bias of an additive mask apart from its predicate; False where that cannot be said."""
    if isinstance(form.bias, TensorBias):
        masks.biases.append(Addition(form.bias.node, factor))
    elif isinstance(form.bias, Alibi):
        sign = form.bias.scale * factor
        if form.bias.position == "distance" and is_causal(form.predicate):
            sign = -sign  # |key - query| is query - key where a causal mask leaves anything
        elif form.bias.position == "distance":
            return False
        masks.slopes = (form.bias.slopes, sign)
    return True


def _dense(form: MaskForm, condition: fx.Node, masked_where_true: bool) -> MaskForm:
    predicate: Predicate = Not(Dense(0)) if masked_where_true else Dense(0)
    return MaskForm(predicate, (condition,), form.fill, None, form.dtype, "replace")


def _common_fill(parts: list[_Part], predicate: Predicate, hidden: bool, scores: Scores, lengths: Any) -> float | None:
    """The number that all masks together write, minus infinity where none shows; None where no single number says it.

    ``hidden``: whether a bias may hide keys as well, so that a row may be empty though the predicate leaves it keys.
    """
    fills = {max(scores.least, part.fill) for part in parts}
    if fills <= {-math.inf} and not (hidden and scores.least > -math.inf):
        return -math.inf
    if hidden:
        return None
    if all(fill <= _NOTHING_LEFT for fill in fills) and every_row_nonempty(predicate, *lengths):
        return -math.inf  # every row has a key: the softmax gives exactly zero wherever such a number was written
    if len(fills) > 1:
        return None
    (fill,) = fills
    first = scores.maskings.index(parts[0].source)
    if fill > _NOTHING_LEFT and any(isinstance(item, Addition) for item in scores.maskings[first:]):
        return None  # what is added to such a number shows in a row without a key
    added = any(isinstance(part.source, Addition) for part in parts)
    return fill if len(parts) == 1 or fill == scores.least or not added else None


def _written_out(scores: Scores) -> Masks:
    """All maskings as one bias. Adding what they make of zero is exact where what they write absorbs the score."""
    for item in scores.maskings:
        if isinstance(item, Condition) and item.fill > _NOTHING_LEFT:
            raise Refused("several masks write different values, and a row may have no key at all", item.condition)
    return Masks(chain=tuple(scores.maskings), least=scores.least)


def _shifted(predicate: Predicate, by: int) -> Predicate:
    """The predicate with its tensors numbered from ``by``."""
    return renumber(predicate, {number: number + by for number in tensors_of(predicate)})


def _expressible(form: MaskForm) -> bool:
    """Whether the predicate's bounds name no size other than the two lengths, so that the operator can hold it."""
    return _names(form.predicate) <= {QUERY_LENGTH, KEY_LENGTH}


def _names(value: Any) -> set[str]:
    if isinstance(value, Length):
        return {name for name, _ in value.terms}
    if isinstance(value, tuple):
        return set().union(*map(_names, value)) if value else set()
    if is_dataclass(value):
        return set().union(*(_names(getattr(value, item.name)) for item in fields(value)), set())
    return set()


_INTERPRETERS: WeakKeyDictionary[Program, Interpreter] = WeakKeyDictionary()


def interpreter_of(program: Program) -> Interpreter:
    """One mask interpreter a program: layers share their masks."""
    known = _INTERPRETERS.get(program)
    if known is None:
        known = _INTERPRETERS[program] = Interpreter(program.graph, _constant_masks(program))
    return known


def _constant_masks(program: Program) -> dict[fx.Node, torch.Tensor]:
    mutated = set(program.mutated().values())
    found: dict[fx.Node, torch.Tensor] = {}
    for node in program.weight_placeholders():
        name = program.weight_name(node)
        if name is None or name in program.parameters() or name in mutated or rank(node) < 2:
            continue
        tensor = program.weights.get(name)
        if tensor.numel() <= _LARGEST_CONSTANT_MASK:
            found[node] = tensor
    return found
