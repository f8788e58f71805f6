"""Derived weights are data: operations on named tensors, computed when they are asked for."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from regraft.ir.weights import WEIGHT_OPS, WeightError, WeightOp, WeightStore


def tensor(*size: int) -> Tensor:
    return torch.arange(torch.Size(size).numel(), dtype=torch.float32).reshape(size)


def store() -> WeightStore:
    return WeightStore({"a": tensor(2, 3), "b": tensor(4, 3)})


@pytest.mark.parametrize(
    ("op", "inputs", "options", "expected"),
    [
        ("concat", ("a", "b"), {"dim": 0}, torch.cat([tensor(2, 3), tensor(4, 3)])),
        ("permute", ("a",), {"dims": [1, 0]}, tensor(2, 3).T),
        ("reshape", ("a",), {"shape": [3, 2]}, tensor(3, 2)),
        ("cast", ("a",), {"dtype": "bfloat16"}, tensor(2, 3).bfloat16()),
        ("slice", ("b",), {"dim": 0, "start": 1, "end": 3}, tensor(4, 3)[1:3]),
        ("index", ("b",), {"dim": 0, "indices": [3, 0]}, tensor(4, 3)[[3, 0]]),
        ("zero_bias", ("b",), {"dim": 0}, torch.zeros(4)),
    ],
)
def test_operation(op: str, inputs: tuple[str, ...], options: dict[str, object], expected: Tensor) -> None:
    weights = store()

    result = weights.get(weights.derive("new", WeightOp(op, inputs, options)))

    assert result.dtype == expected.dtype and torch.equal(result, expected)


def test_operations_of_convolutions() -> None:
    """A norm with eps 0, variance 4: half the input; its mean of 1 and bias of 3 shift by 2.5, through the weights."""
    kernel, one = torch.ones(2, 1, 1, 1), torch.ones(2)
    weights = WeightStore({"k": kernel, "w": one, "b": 3 * one, "m": one, "v": 4 * one})
    for op, expected in (("normed_weight", 0.5 * kernel), ("normed_bias", 2.5 * one)):
        options = {"eps": 0.0, "before": True, "groups": 2}
        assert torch.equal(weights.get(weights.derive("new", WeightOp(op, tuple("kwbmv"), options))), expected)
    centred = weights.get(weights.derive("new", WeightOp("with_centre", ("k",))))
    assert torch.equal(centred, kernel + 1) and torch.equal(kernel, torch.ones(2, 1, 1, 1))


def test_every_operation_is_covered_above() -> None:
    simple = {"concat", "permute", "reshape", "cast", "slice", "index", "zero_bias"}
    assert set(WEIGHT_OPS) == simple | {"normed_weight", "normed_bias", "with_centre"}


def test_operation_survives_json() -> None:
    op = WeightOp("slice", ("a",), {"dim": 0, "start": 0, "end": 1})
    assert WeightOp.from_json(json.loads(json.dumps(op.to_json()))) == op


def test_unknown_operation_names_the_known_ones() -> None:
    with pytest.raises(WeightError, match=r"unknown weight operation 'rotate'; known: cast, concat"):
        WeightOp("rotate", ("a",))


def test_missing_weight_is_named() -> None:
    with pytest.raises(WeightError, match="no weight named 'c'"):
        store().get("c")


def test_same_operation_is_derived_once() -> None:
    weights = store()
    first = weights.derive("t", WeightOp("permute", ("a",), {"dims": [1, 0]}))
    second = weights.derive("other", WeightOp("permute", ("a",), {"dims": [1, 0]}))
    assert first == second == "t"


def test_names_stay_distinct() -> None:
    weights = store()
    names = [weights.derive("a", WeightOp("reshape", ("a",), {"shape": [size, -1]})) for size in (1, 6)]
    assert names == ["a_1", "a_2"]


def test_derived_weights_nest() -> None:
    weights = store()
    both = weights.derive("ab", WeightOp("concat", ("a", "b"), {"dim": 0}))
    turned = weights.derive("ab.T", WeightOp("permute", (both,), {"dims": [1, 0]}))

    assert torch.equal(weights.get(turned), torch.cat([tensor(2, 3), tensor(4, 3)]).T)
    assert list(weights.sources(turned)) == ["a", "b"]


def test_conversion_reaches_the_originals() -> None:
    weights = store()
    name = weights.derive("ab", WeightOp("concat", ("a", "b"), {"dim": 0}))
    assert weights.get(name, lambda t: t.to("meta")).device.type == "meta"


def test_discarded_weight_can_be_derived_again() -> None:
    weights = store()
    op = WeightOp("permute", ("a",), {"dims": [1, 0]})
    weights.discard(weights.derive("t", op))
    assert "t" not in weights

    assert torch.equal(weights.get(weights.derive("t", op)), tensor(2, 3).T)


def test_kept_weights_keep_what_they_are_made_of() -> None:
    weights = store()
    name = weights.derive("t", WeightOp("permute", ("a",), {"dims": [1, 0]}))
    weights.derive("unused", WeightOp("permute", ("b",), {"dims": [1, 0]}))

    weights.keep_only({name})

    assert set(weights.originals) == {"a"} and set(weights.derived) == {"t"}


def test_tied_weights_count_once() -> None:
    tied = tensor(2, 3)
    assert WeightStore({"embed": tied, "head": tied}).nbytes() == 24


def test_copy_shares_tensors_and_not_names() -> None:
    weights = store()
    twin = weights.copy()
    twin.derive("t", WeightOp("permute", ("a",), {"dims": [1, 0]}))
    twin.add_constant("table", tensor(1))

    assert twin.get("a").data_ptr() == weights.get("a").data_ptr()
    assert "t" not in weights and "table" not in weights
