"""What happens to attention scores between ``q @ k.T`` and ``softmax``: scale, softcap, masks, biases, sinks.

``read_scores`` interprets the steps of a matched chain, in order, and refuses what has no place in one attention:
the reason names the step. ``read_masks`` then turns mask tensors and conditions into one predicate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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
from regraft.ir.mask.predicate import And, Dense, Not, Or, tensors_of
from regraft.ir.matcher import TakenStep
from regraft.ir.nodes import dtype, is_tensor, rank, shape
from regraft.ir.program import Program

aten = torch.ops.aten

#: A number this low, or lower, leaves no weight beside any key that is not masked, in fp32 and in bf16.
_NOTHING_LEFT = -1e30
_LARGEST_CONSTANT_MASK = 1 << 22  # elements; larger buffers are not read as masks


class Refused(Exception):
    """A step of the scores that one attention operator cannot express."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclass
class Scores:
    """The steps in normal form: ``softcap(scale * q k^T)``, then additions and conditions, then a sink column."""

    scale: float = 1.0
    softcap: float = 0.0
    #: (tensor that is added, factor that it is multiplied with afterwards)
    additions: list[tuple[fx.Node, float]] = field(default_factory=list)
    #: (condition, number written where masked, whether true means masked, element type of the scores there)
    conditions: list[tuple[fx.Node, float, bool, torch.dtype]] = field(default_factory=list)
    sinks: fx.Node | None = None
    #: the node whose leading dims are those of the masks
    site: fx.Node | None = None

    def masked(self) -> bool:
        """Whether anything has been added to or masked in the scores yet."""
        return bool(self.additions or self.conditions)


def read_scores(product: fx.Node, steps: Iterable[TakenStep]) -> Scores:
    """Interpret the steps, innermost first; raises ``Refused``."""
    scores = Scores(site=product)
    for step in steps:
        if scores.sinks is not None and step.label != "minus_maximum" and step.label != "cast":
            raise Refused(f"{step.label} after the sink column", step.node)
        _READERS[step.label](scores, step)
        if step.label in ("add", "where_other", "where_self", "where_tensor") and rank(step.node) >= 4:
            scores.site = step.node
    return scores


def _read_scale(scores: Scores, step: TakenStep, factor: float) -> None:
    if scores.softcap:
        raise Refused("the scores are scaled after the softcap", step.node)
    if any(math.isfinite(fill) for _, fill, _, _ in scores.conditions):
        raise Refused("the scores are scaled after a finite mask value", step.node)
    scores.scale *= factor
    scores.additions = [(node, before * factor) for node, before in scores.additions]


def _read_softcap(scores: Scores, step: TakenStep) -> None:
    if scores.masked():
        raise Refused("the softcap comes after the mask", step.node)
    inner = 1 / step["inverse"] if "inverse" in step.bindings else step["cap"]
    if not math.isclose(inner, step["outer"], rel_tol=1e-6):
        raise Refused(f"tanh is divided by {inner} inside and multiplied by {step['outer']} outside", step.node)
    scores.softcap = float(step["outer"])


def _read_addition(scores: Scores, step: TakenStep) -> None:
    scores.additions.append((step["addend"], 1.0))


def _read_where(scores: Scores, step: TakenStep, masked_where_true: bool) -> None:
    fill = step["fill"]
    if isinstance(fill, fx.Node):
        constant = _constant(fill)
        if constant is None:
            raise Refused("the mask selects between the scores and another tensor", step.node)
        fill = constant
    scores.conditions.append((step["condition"], float(fill), masked_where_true, dtype(step.node)))


def _constant(node: fx.Node) -> float | None:
    if node.target in (aten.full.default, aten.scalar_tensor.default):
        value = node.args[1] if node.target is aten.full.default else node.args[0]
        return float(value) if isinstance(value, (int, float)) else None
    if node.target is aten.to.dtype and isinstance(node.args[0], fx.Node):
        return _constant(node.args[0])
    return None


def _read_sinks(scores: Scores, step: TakenStep) -> None:
    column = step["column"]
    if rank(step.node) != 4 or shape(column)[-1] != 1:
        raise Refused("what is concatenated to the scores is not one column of sinks", step.node)
    sinks = column
    while isinstance(sinks, fx.Node) and sinks.target in _VIEWS and rank(sinks) > 1:
        sinks = sinks.args[0]
    heads = shape(step.node)[1]
    if not is_tensor(sinks) or shape(sinks) != (heads,):
        raise Refused("the sink column is not one number a head", step.node)
    scores.sinks = sinks


_VIEWS = (aten.expand.default, aten.reshape.default, aten.unsqueeze.default)


def _ignore(scores: Scores, step: TakenStep) -> None:
    """Casts change precision only; subtracting the row maximum does not change a softmax."""


_READERS: dict[str, Any] = {
    "scale": lambda scores, step: _read_scale(scores, step, step["factor"]),
    "divide": lambda scores, step: _read_scale(scores, step, 1 / step["divisor"]),
    "softcap": _read_softcap,
    "add": _read_addition,
    "where_other": lambda scores, step: _read_where(scores, step, masked_where_true=False),
    "where_self": lambda scores, step: _read_where(scores, step, masked_where_true=True),
    "where_tensor": lambda scores, step: _read_where(scores, step, masked_where_true=False),
    "sinks": _read_sinks,
    "cast": _ignore,
    "minus_maximum": _ignore,
    "reshape": _ignore,
}


@dataclass
class Masks:
    """All masks of a site as one predicate, and what is added to the scores besides."""

    predicate: Predicate = field(default_factory=Everything)
    tensors: list[fx.Node] = field(default_factory=list)
    fill: float | None = None
    biases: list[tuple[fx.Node, float]] = field(default_factory=list)
    slopes: tuple[fx.Node, float] | None = None


def read_masks(program: Program, scores: Scores, query_length: Any, key_length: Any) -> Masks:
    """One predicate for all additions and conditions; what is no mask stays a bias. Raises ``Refused``."""
    interpreter = interpreter_of(program)
    masks = Masks()
    forms: list[MaskForm] = []
    for node, factor in scores.additions:
        form = recognize_mask(node, query_length, key_length, interpreter)
        if isinstance(form, Refusal):
            raise Refused(f"what is added to the scores is no mask or bias: {form.reason}", node)
        if _expressible(form) and (factor == 1 or form.fill in (None, -math.inf)) and _additive_is_exact(form):
            forms.append(form)
            _add_bias(masks, form, node, factor)
        else:
            masks.biases.append((node, factor))
    for condition, fill, masked_where_true, kind in scores.conditions:
        form = recognize_condition(condition, fill, query_length, key_length, kind, masked_where_true, interpreter)
        if isinstance(form, Refusal):
            raise Refused(f"the scores are masked by {form.reason}", condition)
        forms.append(form if _expressible(form) else _dense(form, condition, masked_where_true))
    _conjoin(masks, forms, query_length, key_length)
    return masks


def _additive_is_exact(form: MaskForm) -> bool:
    """Adding minus infinity, or the lowest finite number, leaves nothing of the score, as replacing it does."""
    return form.fill is None or form.fill == -math.inf or form.fill == torch.finfo(form.dtype).min


def _add_bias(masks: Masks, form: MaskForm, node: fx.Node, factor: float) -> None:
    if isinstance(form.bias, TensorBias):
        masks.biases.append((form.bias.node, factor))
    elif isinstance(form.bias, Alibi):
        sign = form.bias.scale * factor
        if form.bias.position == "distance" and is_causal(form.predicate):
            sign = -sign  # |key - query| is query - key where a causal mask leaves anything
        elif form.bias.position == "distance":
            masks.biases.append((node, factor))
            return
        masks.slopes = (form.bias.slopes, sign)


def _dense(form: MaskForm, condition: fx.Node, masked_where_true: bool) -> MaskForm:
    predicate: Predicate = Not(Dense(0)) if masked_where_true else Dense(0)
    return MaskForm(predicate, (condition,), form.fill, None, form.dtype, "replace")


def _conjoin(masks: Masks, forms: list[MaskForm], query_length: Any, key_length: Any) -> None:
    """And of all masks. Their fills must agree, unless no row can be empty: then a fill leaves no trace."""
    masking = [form for form in forms if not isinstance(form.predicate, Everything)]
    parts: list[Predicate] = []
    for form in masking:
        parts.append(_shifted(form.predicate, len(masks.tensors)))
        masks.tensors += form.tensors
    if not parts:
        return
    lengths = proof_lengths(query_length, key_length)
    masks.predicate = parts[0] if len(parts) == 1 else simplify(And(tuple(parts)), *lengths)
    fills = {-math.inf if form.fill is None else form.fill for form in masking}
    if all(fill <= _NOTHING_LEFT for fill in fills) and every_row_nonempty(masks.predicate, *lengths):
        fills = {-math.inf}  # every row has a key: the softmax gives exactly zero wherever such a number was written
    if len(fills) > 1:
        raise Refused("several masks write different values, and a row may have no key at all")
    fill = fills.pop()
    masks.fill = None if fill == -math.inf else fill


def _shifted(predicate: Predicate, by: int) -> Predicate:
    """The predicate with its tensors numbered from ``by``."""
    match predicate:
        case Not(operand):
            return Not(_shifted(operand, by))
        case And(operands):
            return And(tuple(_shifted(operand, by) for operand in operands))
        case Or(operands):
            return Or(tuple(_shifted(operand, by) for operand in operands))
    if not tensors_of(predicate):
        return predicate
    return type(predicate)(*(getattr(predicate, item.name) + by for item in fields(predicate)))  # type: ignore[arg-type]


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
