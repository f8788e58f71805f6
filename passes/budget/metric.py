"""What a rewritten model loses: a number for each sample, 0 where its outputs are those of the original.

Named metrics look at every floating-point output, or at the one that is named, and take the worst of them. Dim 0 of
an output is the batch. They are computed in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map_only

from regraft.passes.budget.errors import BudgetError

#: Output and reference, as the model returns them, to a loss: a number for the batch, or one for each sample.
MetricFunction = Callable[[Any, Any], Any]


def kl(output: Tensor, reference: Tensor) -> Tensor:
    """``KL(softmax(reference) || softmax(output))`` in nats over the last dim ``[batch, …, classes]``, mean over the
    rows of a sample."""
    wanted, given = (_rows(value, "kl").log_softmax(-1) for value in (reference, output))
    share = wanted.exp()
    return torch.where(share > 0, share * (wanted - given), share).sum(-1).clamp(min=0.0).mean(-1)


def top1(output: Tensor, reference: Tensor) -> Tensor:
    """Share of the rows of a sample whose largest entry is at another place: one minus the top-1 agreement."""
    given, wanted = (_rows(value, "top1") for value in (output, reference))
    other = (given.argmax(-1) != wanted.argmax(-1)).double()
    broken = given.isnan().any(-1) | wanted.isnan().any(-1)
    return other.masked_fill(broken, math.nan).mean(-1)


def cosine(output: Tensor, reference: Tensor) -> Tensor:
    """One minus the cosine along the last dim, mean over the rows of a sample. Rows of zeros are like each other, and
    like nothing else."""
    given, wanted = (_rows(value, "cosine") for value in (output, reference))
    lengths = given.norm(dim=-1) * wanted.norm(dim=-1)
    equal = (given == wanted).all(-1)
    similar = (given * wanted).sum(-1) / torch.where(lengths > 0, lengths, 1.0)
    return torch.where(equal, 0.0, 1.0 - similar).clamp(min=0.0).mean(-1)


def relative_l2(output: Tensor, reference: Tensor) -> Tensor:
    """``||output - reference|| / ||reference||`` of each sample."""
    given, wanted = (value.double().reshape(value.shape[0], -1) for value in (output, reference))
    distance, length = (given - wanted).norm(dim=-1), wanted.norm(dim=-1)
    return torch.where(length > 0, distance / torch.where(length > 0, length, 1.0), distance)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "top1": top1,
    "cosine": cosine,
    "relative_l2": relative_l2,
}
#: Metrics that count errors: few samples leave a rate open that no spread shows.
RATES = frozenset({"top1"})


def losses(metric: str | MetricFunction, output: Any, reference: Any, name: str | None = None) -> Tensor:
    """The loss of each sample of one batch, ``[samples]`` in fp64; one number where the metric gives one for the batch.

    Raises ``BudgetError`` for outputs that the metric cannot compare.
    """
    if not isinstance(metric, str):
        return _called(metric, output, reference)
    wanted = _compared(reference, name)
    given = {key: value for key, value in _floating(output).items() if key in wanted}
    worst: Tensor | None = None
    for key, value in wanted.items():
        if key not in given or given[key].shape != value.shape:
            raise BudgetError(f"the output {key!r} has another shape than the original's {list(value.shape)}")
        own = METRICS[metric](given[key], value)
        worst = own if worst is None else torch.maximum(worst, own)
    assert worst is not None
    return worst


def _called(metric: MetricFunction, output: Any, reference: Any) -> Tensor:
    own = tree_map_only(Tensor, torch.clone, (output, reference))  # it may write to them, and others are compared later
    try:
        returned = metric(*own)
    except Exception as error:  # the user's function may raise anything
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise BudgetError(
            f"the metric {_name(metric)} raised {type(error).__name__} ({said}); it is called with the outputs of the "
            "rewritten and of the original model, and must return a number or one for each sample"
        ) from error
    found = _numbers(metric, returned)
    if found.dim() > 1 or not found.numel():
        raise BudgetError(
            f"the metric {_name(metric)} returned a tensor of shape {list(found.shape)}; return a number, or one for "
            "each sample"
        )
    sizes = {value.shape[0] for value in _floating(reference).values()}
    if sizes and found.numel() not in {1, *sizes}:
        raise BudgetError(
            f"the metric {_name(metric)} returned {found.numel()} numbers for a batch of {min(sizes)}; return one, or "
            "one for each sample"
        )
    return found.reshape(-1)


def _numbers(metric: MetricFunction, returned: Any) -> Tensor:
    try:
        found = torch.as_tensor(returned).detach().cpu()
    except Exception:  # whatever is no number
        found = None
    if found is None or found.is_complex():
        raise BudgetError(
            f"the metric {_name(metric)} returned {_described(returned)}; return a number, or one for each sample"
        )
    return found.double()


def _described(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _name(metric: MetricFunction) -> str:
    return getattr(metric, "__name__", type(metric).__name__)


def metric_name(metric: str | MetricFunction) -> str:
    """What a report calls a metric."""
    return metric if isinstance(metric, str) else _name(metric)


def _compared(reference: Any, name: str | None) -> dict[str, Tensor]:
    """The outputs that are compared, by name."""
    found = _floating(reference)
    if name is not None:
        if name not in found:
            known = ", ".join(map(repr, found)) or "none"
            raise BudgetError(f"the model has no floating-point output {name!r}; it has {known}")
        found = {name: found[name]}
    if not found:
        raise BudgetError("the model has no floating-point output with a batch; give a metric of your own, a function")
    if len({value.shape[0] for value in found.values()}) > 1:
        shown = ", ".join(f"{key} {list(value.shape)}" for key, value in found.items())
        raise BudgetError(f"the outputs have no common batch ({shown}); name the one to compare: Budget(…, output=…)")
    return found


def _floating(output: Any) -> dict[str, Tensor]:
    """Floating-point tensors with a batch dim by their place in the output: "logits", "0", "past.0.1"; a lone tensor
    is called "output". One that holds no number has nothing to compare."""
    leaves, _ = tree_flatten_with_path(output)
    return {
        ".".join(_step(key) for key in path) or "output": value
        for path, value in leaves
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0 and value.numel()
    }


def _step(key: Any) -> str:
    return next((str(getattr(key, kind)) for kind in ("key", "idx", "name") if hasattr(key, kind)), str(key))


def _rows(value: Tensor, metric: str) -> Tensor:
    """``[batch, rows, classes]`` in fp64."""
    if value.dim() < 2:
        raise BudgetError(
            f"the metric {metric!r} compares rows along the last dim, and an output has shape {list(value.shape)}; "
            "name another output, or use 'relative_l2' or a metric of your own"
        )
    return value.double().reshape(value.shape[0], -1, value.shape[-1])
