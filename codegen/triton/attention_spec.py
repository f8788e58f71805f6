"""What an attention kernel is emitted for: everything about a site that its text depends on, and what is refused.

A spec holds no length, batch, head count, scale or softcap: those reach the kernel at run time, so that one kernel
serves every length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regraft.codegen.cpu.attention_masks import gets_no_weight, parsed
from regraft.codegen.triton.mask_operands import clash, mask_operands
from regraft.ir.mask import Predicate, every_row_nonempty, proof_lengths, simplify
from regraft.ir.mask.length import KEY_LENGTH, QUERY_LENGTH, Length
from regraft.ir.mask.predicate import And, Band, Chunk, Not, Or, Prefix
from regraft.ir.nodes import dtype, shape

#: Element types of query, key and value that kernels are emitted and tested for.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Weights of scores: exp(s), and maps that need no shift by the row's maximum (attention.md 3.1).
WEIGHTS = ("exp", "sigmoid", "relu", "elu1", "gelu", "identity")
#: What the sum of weights Z makes of a row: 1/Z, 1, 1/(Z + eps), 1/max(|Z|, 1), a constant.
NORMALISERS = ("sum", "none", "sum_eps", "sum_abs", "constant")
PRECISIONS = ("ieee", "tf32", "tf32x3")
#: What a row that sees no key gives.
EMPTY_ROWS = ("nan", "zero", "mean")
SMALLEST_DIM, LARGEST_DIM = 1, 512
_BOUND_NAMES = (QUERY_LENGTH, KEY_LENGTH)
_WITH_CONSTANT = ("sum_eps", "constant")
#: What an attention is where its operator has no argument for it.
_DEFAULTS: dict[str, Any] = {
    "sinks": None,
    "mask_fill": None,
    "empty_rows": "nan",
    "weight": "exp",
    "normaliser": "sum",
    "constant": 1.0,
}


class Unsupported(ValueError):
    """A site that no kernel is emitted for; the message says why, and what runs instead is the caller's choice."""


@dataclass(frozen=True)
class AttentionSpec:
    """One attention kernel.

    ``mask`` is the text of a predicate; ``mask_fill`` a number that stands at masked scores and may take weight (None:
    they are removed); ``empty_rows``, one of ``EMPTY_ROWS``, is of a softmax: other weights leave a row without keys
    to the normaliser. ``bias``: "none", "dense" (broadcasts to ``[batch, heads, length, keys]``) or "keys" (the same
    for all rows). ``lse``: also return the log-sum-exp of the keys' scores, natural logarithm, without the sink, in
    fp32. ``wide``: the output is in fp32, to be merged with others. ``constant`` belongs to the normalisers "sum_eps"
    and "constant". ``precision`` is that of fp32 products.
    """

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    mask: str = "all"
    mask_fill: float | None = None
    empty_rows: str = "nan"
    bias: str = "none"
    slopes: bool = False
    sinks: bool = False
    softcap: bool = False
    weight: str = "exp"
    normaliser: str = "sum"
    constant: float = 1.0
    lse: bool = False
    wide: bool = False
    precision: str = "ieee"

    @property
    def predicate(self) -> Predicate:
        """The mask in normal form."""
        return simplify(parsed(self.mask))

    @property
    def softmax(self) -> bool:
        """Whether weights are exp(s) over their sum."""
        return self.weight == "exp" and self.normaliser == "sum"

    @property
    def online(self) -> bool:
        """Whether the row's maximum is taken away from scores as it is found, and comes back at the end: exp(s) itself
        leaves fp16 at a score of 11."""
        return self.weight == "exp"


def supports(spec: AttentionSpec) -> str | None:
    """Why no kernel is emitted for a spec; None where one is."""
    if spec.dtype not in DTYPES:
        return f"elements are {spec.dtype}, and kernels take {', '.join(map(str, DTYPES))}"
    for name, size in (("head_dim", spec.head_dim), ("value_dim", spec.value_dim)):
        if not SMALLEST_DIM <= size <= LARGEST_DIM:
            return f"{name} is {size}, and kernels take {SMALLEST_DIM} to {LARGEST_DIM}"
    for name, value, known in (
        ("weight", spec.weight, WEIGHTS),
        ("normaliser", spec.normaliser, NORMALISERS),
        ("precision", spec.precision, PRECISIONS),
        ("empty_rows", spec.empty_rows, EMPTY_ROWS),
        ("bias", spec.bias, ("none", "dense", "keys")),
    ):
        if value not in known:
            return f"{name} is {value!r}, and kernels know {', '.join(known)}"
    shapes = clash(mask_operands([spec.predicate]))
    if shapes is not None:
        return shapes
    names = _symbols(spec.predicate) - set(_BOUND_NAMES)
    if names:
        return f"the mask {spec.mask} has bounds in {', '.join(sorted(names))}, which no kernel is given"
    if not spec.softmax:
        return _supports_plain(spec)
    if spec.mask_fill is not None and math.isnan(spec.mask_fill):
        return "masked scores are NaN"
    return None


def _supports_plain(spec: AttentionSpec) -> str | None:
    pair = f"weights {spec.weight} normalised by {spec.normaliser}"
    if spec.sinks:
        return f"{pair} have no sink"
    if spec.lse:
        return f"{pair} have no log-sum-exp"
    if spec.mask_fill is not None:
        return f"{pair} have no value at masked scores: the mask is 0/1"
    if spec.normaliser in _WITH_CONSTANT and not 0 < abs(spec.constant) < math.inf:
        return f"the constant of the normaliser {spec.normaliser} is {spec.constant}, and kernels divide by it"
    return None


def _symbols(predicate: Predicate) -> set[str]:
    """Names in the bounds of a predicate."""

    def names(*lengths: Length | None) -> set[str]:
        return {name for length in lengths if length is not None for name, _ in length.terms}

    match predicate:
        case And(operands) | Or(operands):
            return set().union(*map(_symbols, operands))
        case Not(operand):
            return _symbols(operand)
        case Band(lower, upper):
            return names(lower, upper)
        case Prefix(length):
            return names(length)
        case Chunk(_, offset):
            return names(offset)
    return set()


def site_spec(given: dict[str, Any], lse: bool = False, precision: str = "ieee") -> AttentionSpec:
    """The spec of a ``regraft::attention`` or ``regraft::attention_mapped`` site, from its arguments by name
    (``ir.nodes.arguments``).

    Raises ``Unsupported`` with the reason where no kernel is emitted for it: the operator's reference or PyTorch's
    attention runs such a site.
    """
    given = {**_DEFAULTS, **given}
    tensors = [given[name] for name in ("query", "key", "value")]
    if len({dtype(tensor) for tensor in tensors}) > 1:
        raise Unsupported(f"query, key and value are {', '.join(str(dtype(tensor)) for tensor in tensors)}")
    head_dim, value_dim = shape(given["query"])[-1], shape(given["value"])[-1]
    if not isinstance(head_dim, int) or not isinstance(value_dim, int):
        raise Unsupported("head_dim or value_dim is symbolic")
    if given["scale"] <= 0:
        raise Unsupported(f"scale is {given['scale']}, and kernels take positive ones")
    if given["softcap"] < 0:
        raise Unsupported(f"softcap is {given['softcap']}, and kernels take positive ones")
    mask, fill, empty = _fill_and_empty(given)
    spec = AttentionSpec(
        dtype=dtype(given["query"]),
        head_dim=head_dim,
        value_dim=value_dim,
        mask=mask,
        mask_fill=fill,
        empty_rows=empty,
        bias=_bias_kind(given["bias"]),
        slopes=given["slopes"] is not None,
        sinks=given["sinks"] is not None,
        softcap=bool(given["softcap"]),
        weight=given["weight"],
        normaliser=given["normaliser"],
        constant=given["constant"] if given["normaliser"] in _WITH_CONSTANT else 1.0,
        lse=lse,
        precision=precision,
    )
    reason = supports(spec)
    if reason is not None:
        raise Unsupported(reason)
    return spec


def _fill_and_empty(given: dict[str, Any]) -> tuple[str, float | None, str]:
    """Mask, fill and empty rows of a kernel.

    A number that leaves masked keys no weight beside any other removes them; what it leaves of a row without keys is
    the mean of all values. Beside a bias, which may be as low, it keeps its place. A bias may hide what the predicate
    shows, so that it proves nothing about rows.
    """
    predicate, fill = parsed(given["mask"]), given["mask_fill"]
    lengths = proof_lengths(shape(given["query"])[2], shape(given["key"])[2])
    never = given["bias"] is None and None not in lengths and every_row_nonempty(predicate, *lengths)
    if fill is None or fill == -math.inf:
        return str(simplify(predicate)), None, "zero" if never else given["empty_rows"]
    if gets_no_weight(fill) and given["bias"] is None:
        return str(simplify(predicate)), None, "zero" if never else "mean"
    return str(simplify(predicate)), float(fill), given["empty_rows"]


def _bias_kind(bias: Any) -> str:
    if bias is None:
        return "none"
    sizes: Sequence[Any] = shape(bias)
    return "keys" if len(sizes) < 2 or (isinstance(sizes[-2], int) and sizes[-2] == 1) else "dense"
