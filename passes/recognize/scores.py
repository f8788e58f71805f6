"""What happens to attention scores between ``q @ k.T`` and ``softmax``: scale, softcap, masks, biases, sinks.

``read_scores`` interprets the steps of a matched chain, in order, and refuses what has no place in one attention:
the reason names the step. ``masks.py`` then turns mask tensors and conditions into one predicate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from regraft.ir.matcher import TakenStep
from regraft.ir.nodes import arguments, dtype, is_call, is_tensor, rank, shape, sizes_equal

aten = torch.ops.aten


class Refused(Exception):
    """A step of the scores that one attention operator cannot express."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclass(frozen=True)
class Addition:
    """A tensor that is added to the scores, and the factor that the sum is multiplied with afterwards.

    ``within``: the sum, where its dims are not those of the masks (batch and heads in one, positions in two).
    """

    node: fx.Node
    factor: float = 1.0
    within: fx.Node | None = None


@dataclass(frozen=True)
class Condition:
    """A number written over the scores: where ``condition`` is false, or where it is true.

    ``dtype`` is the element type of the scores there.
    """

    condition: fx.Node
    fill: float
    masked_where_true: bool
    dtype: torch.dtype


@dataclass
class Scores:
    """The steps in normal form: ``softcap(scale * q k^T)``, then additions and conditions, then a sink column."""

    scale: float = 1.0
    #: tensors that the scores of each query are multiplied (True) or divided with
    factors: list[tuple[fx.Node, bool]] = field(default_factory=list)
    softcap: float = 0.0
    #: additions and conditions, in the order of the source
    maskings: list[Addition | Condition] = field(default_factory=list)
    #: the logits of the sink column, one a head, or one number for all
    sinks: fx.Node | float | None = None
    #: the number that the masked scores were raised to where they lay below it
    least: float = -math.inf
    #: the node whose leading dims are those of the masks
    site: fx.Node | None = None

    @property
    def additions(self) -> list[Addition]:
        """The additions alone."""
        return [item for item in self.maskings if isinstance(item, Addition)]


def read_scores(product: fx.Node, steps: Iterable[TakenStep]) -> Scores:
    """Interpret the steps, innermost first; raises ``Refused``."""
    scores = Scores(site=product)
    for step in steps:
        if scores.sinks is not None and step.label != "minus_maximum" and step.label != "cast":
            raise Refused(f"{step.label} after the sink column", step.node)
        if scores.least > -math.inf and step.label not in ("minus_maximum", "cast", "reshape", "sinks"):
            raise Refused(f"{step.label} after the clamp of the scores", step.node)
        _READERS[step.label](scores, step)
        if step.label in _MASKINGS and _says_heads(step.node, product):
            scores.site = step.node
    scores.maskings = [_placed(item, scores) for item in scores.maskings]
    return scores


def _placed(item: Addition | Condition, scores: Scores) -> Addition | Condition:
    """An addition that remembers its sum only where that has other dims than the masks."""
    if isinstance(item, Condition) or item.within is None:
        return item
    site, sum_of = scores.site, item.within
    assert site is not None
    merged = rank(sum_of) == 3 and rank(site) == 4 and rank(item.node) == 3 and shape(item.node)[0] != 1
    windows = rank(sum_of) == 5 and rank(site) == 4 and rank(item.node) > 3
    same = sizes_equal(shape(sum_of)[-2:], shape(site)[-2:])
    return item if merged or windows or not same else replace(item, within=None)


_MASKINGS = ("add", "subtract", "where_other", "where_self", "where_tensor", "blend")


def _says_heads(node: fx.Node, product: fx.Node) -> bool:
    """Whether a masking splits what the product has in one dim, batch and heads."""
    splits = rank(node) >= 4 and not (rank(node) == 5 and rank(product) == 4)
    return splits and sizes_equal(shape(node)[-2:], shape(product)[-2:])


def _read_scale(scores: Scores, step: TakenStep, factor: float) -> None:
    if scores.softcap:
        raise Refused("the scores are scaled after the softcap", step.node)
    if any(isinstance(item, Condition) and math.isfinite(item.fill) for item in scores.maskings):
        raise Refused("the scores are scaled after a finite mask value", step.node)
    scores.scale *= factor
    scores.maskings = [
        replace(item, factor=item.factor * factor) if isinstance(item, Addition) else item for item in scores.maskings
    ]


def _read_softcap(scores: Scores, step: TakenStep) -> None:
    if scores.maskings:
        raise Refused("the softcap comes after the mask", step.node)
    inner = 1 / step["inverse"] if "inverse" in step.bindings else step["cap"]
    if not math.isclose(inner, step["outer"], rel_tol=1e-6):
        raise Refused(f"tanh is divided by {inner} inside and multiplied by {step['outer']} outside", step.node)
    scores.softcap = float(step["outer"])


def _read_at_least(scores: Scores, step: TakenStep) -> None:
    """``max(scores, finfo.min)``: no score lies below that, so it only makes minus infinity finite."""
    if step["least"] > torch.finfo(dtype(step.node)).min:
        raise Refused(f"the scores are clamped to {step['least']:g} from below", step.node)
    scores.least = float(step["least"])


def _read_addition(scores: Scores, step: TakenStep) -> None:
    scores.maskings.append(Addition(step["addend"], 1.0, step.node))


def _read_subtraction(scores: Scores, step: TakenStep) -> None:
    scores.maskings.append(Addition(step["subtrahend"], -1.0, step.node))


def _read_factor(scores: Scores, step: TakenStep, factor: fx.Node, times: bool) -> None:
    """A factor of each query's own (a temperature, a scale of each head) can as well be the query's."""
    if scores.softcap or scores.maskings:
        raise Refused("the scores are scaled by a tensor after the mask or the softcap", step.node)
    assert scores.site is not None
    if rank(factor) > 0 and (shape(factor)[-1] != 1 or not sizes_equal(shape(step.node), shape(scores.site))):
        raise Refused("the scores are scaled by a tensor that is not one number a query", step.node)
    scores.factors.append((factor, times))


def _read_where(scores: Scores, step: TakenStep, masked_where_true: bool) -> None:
    fill = step["fill"]
    if isinstance(fill, fx.Node):
        constant = _constant(fill)
        if constant is None:
            raise Refused("the mask selects between the scores and another tensor", step.node)
        fill = constant
    scores.maskings.append(Condition(step["condition"], float(fill), masked_where_true, dtype(step.node)))


def _read_blend(scores: Scores, step: TakenStep) -> None:
    """``scores * keep + fill * (1 - keep)`` of a ``keep`` that holds 0 and 1 only, which ``masks.py`` asks for."""
    fill = step["fill"] if "plus" in step.bindings else -step["fill"]
    scores.maskings.append(Condition(step["keep"], float(fill), False, dtype(step.node)))


def _constant(node: fx.Node) -> float | None:
    if is_call(node, (*_CONSTANT, aten.scalar_tensor.default)):
        given = arguments(node)
        value = given.get("fill_value", given.get("s", 0.0))
        return float(value) if isinstance(value, (int, float)) else None
    if node.target is aten.to.dtype and isinstance(node.args[0], fx.Node):
        return _constant(node.args[0])
    return None


def _read_sinks(scores: Scores, step: TakenStep) -> None:
    column = step["column"]
    if rank(step.node) not in (4, 5) or shape(column)[-1] != 1:
        raise Refused("what is concatenated to the scores is not one column of sinks", step.node)
    sinks = column
    if is_call(column, _CONSTANT):
        given = arguments(column)
        scores.sinks = float(given.get("fill_value", 0.0))
        return
    while isinstance(sinks, fx.Node) and sinks.target in _VIEWS and rank(sinks) > 1:
        sinks = sinks.args[0]
    heads = math.prod(shape(step.node)[1:-2])  # of grouped queries in two dims
    if not is_tensor(sinks) or shape(sinks) != (heads,):
        raise Refused("the sink column is not one number a head", step.node)
    scores.sinks = sinks


_CONSTANT = (aten.full.default, aten.new_full.default, aten.zeros.default, aten.new_zeros.default)
_VIEWS = (aten.expand.default, aten.reshape.default, aten.unsqueeze.default)


def _ignore(scores: Scores, step: TakenStep) -> None:
    """Casts change precision only; subtracting the row maximum does not change a softmax."""


_READERS: dict[str, Any] = {
    "scale": lambda scores, step: _read_scale(scores, step, step["factor"]),
    "divide": lambda scores, step: _read_scale(scores, step, 1 / step["divisor"]),
    "scale_tensor": lambda scores, step: _read_factor(scores, step, step["factor"], times=True),
    "divide_tensor": lambda scores, step: _read_factor(scores, step, step["divisor"], times=False),
    "softcap": _read_softcap,
    "add": _read_addition,
    "subtract": _read_subtraction,
    "where_other": lambda scores, step: _read_where(scores, step, masked_where_true=False),
    "where_self": lambda scores, step: _read_where(scores, step, masked_where_true=True),
    "where_tensor": lambda scores, step: _read_where(scores, step, masked_where_true=False),
    "blend": _read_blend,
    "sinks": _read_sinks,
    "at_least": _read_at_least,
    "cast": _ignore,
    "minus_maximum": _ignore,
    "reshape": _ignore,
}
