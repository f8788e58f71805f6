"""Semantic operators: torch's own checks, shapes with symbols, references against formulas, cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from regraft.ir import ops
from regraft.ir.ops.activation import ACTIVATIONS, activate
from regraft.ir.ops.add_norm import add_norm
from regraft.ir.ops.moe import moe
from regraft.ir.ops.rope import LAYOUTS
from tests.ir.graphs import numbers, program_of

F64 = torch.float64


SAMPLES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "attention": (
        ops.attention,
        (numbers(2, 4, 3, 8), numbers(2, 2, 5, 8), numbers(2, 2, 5, 6), []),
        {"scale": 0.5, "mask": "band(None,2)"},
    ),
    "attention with everything": (
        ops.attention,
        (
            numbers(2, 4, 3, 8),
            numbers(2, 2, 5, 8),
            numbers(2, 2, 5, 6),
            [torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]])],
            numbers(1, 4, 3, 5),
            numbers(4),
            numbers(4),
        ),
        {"scale": 0.5, "mask": "keys(0)", "mask_fill": -1e4, "empty_rows": "zero", "softcap": 20.0},
    ),
    "attention_lse": (
        ops.attention_lse,
        (numbers(2, 4, 3, 8), numbers(2, 2, 5, 8), [], None, None, numbers(4)),
        {"scale": 0.5, "mask": "band(None,2)", "softcap": 9.0},
    ),
    "attention_max": (
        ops.attention_max,
        (numbers(2, 4, 3, 8), numbers(2, 2, 5, 8), [torch.ones(2, 5)], numbers(3, 5), numbers(4)),
        {"scale": 0.5, "mask": "keys(0)", "mask_fill": -1.0},
    ),
    "attention_column_sums": (
        ops.attention_column_sums,
        (numbers(2, 4, 3, 8), numbers(2, 2, 5, 8), [], numbers(1, 5), numbers(4), numbers(4)),
        {"scale": 0.5, "mask": "band(None,-1)", "empty_rows": "zero"},
    ),
    "attention_topk": (
        ops.attention_topk,
        (numbers(2, 4, 3, 8), numbers(2, 2, 5, 8), []),
        {"scale": 0.5, "mask": "band(None,0)", "count": 3},
    ),
    "attention_topk of groups": (
        ops.attention_topk,
        (numbers(2, 4, 3, 8).bfloat16(), numbers(2, 2, 5, 8).bfloat16(), []),
        {"scale": 0.5, "count": 3, "shared": True},
    ),
    "attention_mapped": (
        ops.attention_mapped,
        (numbers(2, 4, 3, 8), numbers(2, 2, 5, 8), numbers(2, 2, 5, 6), [], numbers(1, 1, 1, 5), numbers(4)),
        {"scale": 0.5, "weight": "sigmoid", "mask": "band(None,2)", "normaliser": "sum_eps", "constant": 1e-8},
    ),
    "select_keys": (
        ops.select_keys,
        (numbers(2, 4, 1, 8), numbers(2, 2, 9, 8), []),
        {"scale": 0.5, "mask": "band(None,4)", "count": 3},
    ),
    "steer": (ops.steer, (numbers(2, 3, 8), numbers(2, 8), 0.1), {}),
    "attention_part": (
        ops.attention_part,
        (numbers(2, 4, 3, 8), numbers(2, 2, 5, 8), numbers(2, 2, 5, 6), [], numbers(3, 9), numbers(4), numbers(4)),
        {"first": 2, "keys": 9, "scale": 0.5, "mask": "band(None,4)", "softcap": 9.0},
    ),
    "attention_merge": (ops.attention_merge, (numbers(3, 2, 4, 5, 7),), {"dtype": torch.bfloat16}),
    "gather": (ops.gather, (numbers(2, 3),), {"ranks": 3}),
    "rms_norm": (ops.rms_norm, (numbers(2, 3, 8), numbers(8), 1e-6), {}),
    "rms_norm without weight": (ops.rms_norm, (numbers(2, 8), None, 1e-6), {}),
    "rms_norm of gemma": (ops.rms_norm, (numbers(2, 8), numbers(8), 1e-6, 1.0, "after_weight"), {}),
    "rms_norm mixed": (ops.rms_norm, (numbers(2, 8).bfloat16(), numbers(8), 1e-6), {}),
    "rope": (ops.rope, (numbers(2, 4, 3, 8), numbers(3, 8), numbers(3, 8), 8), {}),
    "rope partial": (ops.rope, (numbers(2, 4, 3, 8), numbers(3, 2), numbers(3, 2), 4, "interleaved"), {}),
    "add_norm": (add_norm, (numbers(2, 8), numbers(2, 8), numbers(8), None, 1e-6), {}),
    "add_norm of layer_norm": (
        add_norm,
        (numbers(2, 8), numbers(2, 8), numbers(8), numbers(8), 1e-6, "layer_norm"),
        {},
    ),
    "glu": (ops.glu, (numbers(2, 8), numbers(2, 8), "silu"), {}),
    "activation": (ops.activation, (numbers(2, 8), "quick_gelu"), {}),
    "activation none": (ops.activation, (numbers(2, 8), "none"), {}),
    "linear": (ops.linear, (numbers(2, 3, 4), numbers(5, 4)), {}),
    "moe": (
        moe,
        (
            numbers(5, 4),
            torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]]),
            torch.full((5, 2), 0.5),
            numbers(3, 12, 4),
            numbers(3, 4, 6),
        ),
        {},
    ),
    "moe_dispatch": (
        ops.moe_dispatch,
        (
            numbers(3, 4),
            torch.tensor([[0, 2], [1, 0], [2, 1]]),
            torch.full((3, 2), 0.5),
            torch.tensor([[0, 3], [1, -1], [2, -1]]),
        ),
        {"ranks": 2, "slots": 2},
    ),
    "moe_combine": (
        ops.moe_combine,
        (numbers(4, 4), torch.tensor([0, 2, 0, 1]), torch.tensor([[2, 2], [2, 2]]), 3),
        {"ranks": 2, "dtype": torch.bfloat16},
    ),
    "plan_merge": (ops.plan_merge, (numbers(2, 9, 4),), {"remove": 3, "prefix": 1}),
    "plan_merge with everything": (
        ops.plan_merge,
        (numbers(2, 9, 4), numbers(2, 9), torch.arange(9)[None] < torch.tensor([[9], [5]])),
        {"remove": 3, "matching": "fuse", "prefix": 1, "suffix": 1},
    ),
    "pack_tokens": (ops.pack_tokens, (torch.tensor([[1, 1, 0], [1, 0, 0]]), 0, 1), {}),
    "attention_packed": (
        ops.attention_packed,
        (
            numbers(1, 4, 3, 8),
            numbers(1, 2, 3, 8),
            numbers(1, 2, 3, 6),
            torch.tensor([[0, 1, 3]]),
            torch.tensor([0, 2, 3]),
            torch.tensor([[True, True, False]]),
        ),
        {"length": 3, "scale": 0.5, "mask": "band(-1,1)", "empty_rows": "zero"},
    ),
    "merge_tokens": (
        ops.merge_tokens,
        (numbers(1, 4, 3), None, torch.tensor([[0, 1, 3]]), torch.tensor([[2]]), torch.tensor([[0, 1, 0, 2]])),
        {},
    ),
    "unmerge_tokens": (ops.unmerge_tokens, (numbers(1, 3, 3), torch.tensor([[0, 1, -1, 2]])), {}),
    "token_scores": (ops.token_scores, (numbers(2, 4, 5, 8), numbers(2, 2, 5, 8)), {"scale": 0.5, "kind": "received"}),
    "token_scores of values": (
        ops.token_scores,
        (numbers(2, 4, 5, 8), numbers(2, 2, 5, 8), torch.ones(2, 5), numbers(2, 2, 5, 6)),
        {"scale": 0.5, "kind": "flow"},
    ),
    "linear_scan": (ops.linear_scan, (numbers(2, 3, 1), numbers(2, 3, 4), numbers(2, 4)), {}),
    "linear with everything": (
        ops.linear,
        (numbers(2, 3, 4), numbers(5, 4), numbers(5), numbers(2, 3, 5), numbers(2, 3, 5), "gelu"),
        {},
    ),
}


@pytest.mark.parametrize(("operator", "args", "kwargs"), SAMPLES.values(), ids=SAMPLES)
def test_passes_torchs_own_checks(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    torch.library.opcheck(operator, args, kwargs, test_utils=("test_schema", "test_faketensor"))
    with_grad = pytree.tree_map_only(Tensor, lambda x: x.clone().requires_grad_(x.is_floating_point()), args)
    torch.library.opcheck(operator, with_grad, kwargs, test_utils="test_autograd_registration")


def test_every_operator_of_the_library_has_a_sample() -> None:
    """An operator without one fails here, be it in the registry or not."""
    named = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("regraft::")}
    assert named == {sample[0]._schema.name.partition("::")[2] for sample in SAMPLES.values()}


def test_every_operator_is_registered_with_its_meaning() -> None:
    kinds = {operator.kind for operator in ops.OPERATORS.values()}
    assert {"attention", "rms_norm", "rope", "glu", "activation", "linear", "moe"} <= kinds
    assert {sample[0] for sample in SAMPLES.values()} == set(ops.OPERATORS)
    for overload, operator in ops.OPERATORS.items():
        assert operator.overload is overload and callable(operator.reference) and callable(operator.cost)


def in_batches(call: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """The fake value of ``call`` where dim 0 of the first input is a symbol."""
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = (({0: batch}, *(None for _ in args[1:])),)
    program = program_of(call, *args, dynamic=shapes)
    outputs: Any = program.output_node.args[0]
    value: Tensor = outputs[0].meta["val"]
    return value


@pytest.mark.parametrize(
    ("call", "args", "rest"),
    [
        (
            lambda x, k, v: ops.attention(
                x, k.expand(x.shape[0], -1, -1, -1), v.expand(x.shape[0], -1, -1, -1), [], scale=1.0
            ),
            (numbers(3, 4, 5, 8), numbers(1, 2, 7, 8), numbers(1, 2, 7, 6)),
            (4, 5, 6),
        ),
        (lambda x, w: ops.rms_norm(x, w, 1e-6), (numbers(3, 8), numbers(8)), (8,)),
        (lambda x, c, s: ops.rope(x, c, s, 8), (numbers(3, 5, 8), numbers(5, 8), numbers(5, 8)), (5, 8)),
        (lambda x: ops.glu(x, x, "gelu"), (numbers(3, 8),), (8,)),
        (lambda x: ops.activation(x, "quick_gelu"), (numbers(3, 8),), (8,)),
        (lambda x, w: ops.linear(x, w), (numbers(3, 4), numbers(5, 4)), (5,)),
    ],
)
def test_symbols_pass_through(call: Callable[..., Tensor], args: tuple[Tensor, ...], rest: tuple[int, ...]) -> None:
    value = in_batches(call, *args)
    assert isinstance(value.shape[0], torch.SymInt) and tuple(value.shape[1:]) == rest


# ---- references against formulas -----------------------------------------------------------------------------------


def test_attention_is_the_weighted_mean_of_values() -> None:
    q, k, v = (numbers(1, 1, 3, 4, dtype=F64, seed=s) for s in range(3))
    weights = (q[0, 0] @ k[0, 0].T * 0.5).exp()
    expected = weights / weights.sum(-1, keepdim=True) @ v[0, 0]
    torch.testing.assert_close(ops.attention(q, k, v, [], scale=0.5)[0, 0], expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, math.nan),
        ({"empty_rows": "zero"}, 0.0),
        ({"mask_fill": -1e4}, 2.0),  # all keys weigh the same: the mean of 1, 2, 3
    ],
)
def test_row_without_a_key(options: dict[str, Any], expected: float) -> None:
    q, k = numbers(1, 1, 1, 4), numbers(1, 1, 3, 4)
    v = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1)
    out = ops.attention(q, k, v, [torch.zeros(1, 3)], scale=1.0, mask="keys(0)", **options)
    torch.testing.assert_close(out, torch.full_like(out, expected), equal_nan=True)


def test_sink_takes_weight_and_gives_nothing() -> None:
    q, k, v = (numbers(1, 2, 3, 4, dtype=F64, seed=s) for s in range(3))
    sinks = torch.tensor([0.0, 1.5], dtype=F64)
    weights = (q @ k.mT).exp()
    expected = weights / (weights.sum(-1, keepdim=True) + sinks.exp()[:, None, None]) @ v
    torch.testing.assert_close(ops.attention(q, k, v, [], None, None, sinks, scale=1.0), expected)


def test_slopes_count_the_distance() -> None:
    q = torch.zeros(1, 1, 3, 4, dtype=F64)
    v = torch.eye(3, dtype=F64)[None, None]
    out = ops.attention(q, q, v, [], None, torch.tensor([2.0], dtype=F64), scale=1.0)
    rows = torch.arange(3.0, dtype=F64)
    torch.testing.assert_close(out[0, 0], (2 * (rows[None] - rows[:, None])).softmax(-1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_keeps_the_length_of_each_pair(layout: str) -> None:
    x = numbers(3, 8, dtype=F64)
    angle = numbers(3, 4, dtype=F64, seed=1)
    out = ops.rope(x, angle.cos(), angle.sin(), 8, "half" if layout == "half" else layout)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_rope_turns_by_the_angle() -> None:
    angle = torch.tensor([[0.3]], dtype=F64)
    out = ops.rope(torch.tensor([[1.0, 0.0, 9.0]], dtype=F64), angle.cos(), angle.sin(), 2)
    torch.testing.assert_close(out, torch.tensor([[math.cos(0.3), math.sin(0.3), 9.0]], dtype=F64))


def test_rope_of_an_unknown_layout_names_the_known() -> None:
    with pytest.raises(ValueError, match="unknown rope layout 'spiral'; known: half, interleaved"):
        ops.rope(numbers(1, 2), numbers(1, 2), numbers(1, 2), 2, "spiral")


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("none", lambda x: x),
        ("relu", lambda x: x.clamp(min=0)),
        ("relu_squared", lambda x: x.clamp(min=0) ** 2),
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("quick_gelu", lambda x: x / (1 + torch.exp(-1.702 * x))),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
        ("tanh", lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1)),
        ("mish", lambda x: x * torch.tanh(torch.log(1 + torch.exp(x)))),
        ("hardswish", lambda x: x * (x + 3).clamp(0, 6) / 6),
        ("elu", lambda x: torch.where(x > 0, x, torch.exp(x) - 1)),
        ("leaky_relu", lambda x: torch.where(x > 0, x, x / 100)),
        ("softplus", lambda x: torch.log(1 + torch.exp(x))),
    ],
)
def test_activation_formula(name: str, formula: Callable[[Tensor], Tensor]) -> None:
    x = numbers(32, dtype=F64)
    torch.testing.assert_close(activate(x, name), formula(x))


def test_every_activation_has_a_formula_above() -> None:
    assert len(ACTIVATIONS) == 14


def test_unknown_activation_names_the_known() -> None:
    with pytest.raises(ValueError, match="unknown activation 'swash'; known: none, relu"):
        activate(numbers(1), "swash")


def test_linear_with_everything() -> None:
    x, w, b = numbers(2, 4, dtype=F64), numbers(3, 4, dtype=F64), numbers(3, dtype=F64)
    m, r = numbers(2, 3, dtype=F64, seed=1), numbers(2, 3, dtype=F64, seed=2)
    torch.testing.assert_close(ops.linear(x, w, b, m, r, "relu"), (x @ w.T + b).clamp(min=0) * m + r)


@pytest.mark.parametrize("operator", [ops.attention, ops.attention_mapped], ids=["attention", "attention_mapped"])
def test_keys_and_values_have_as_many_heads(operator: Any) -> None:
    options = {"scale": 1.0} | ({"weight": "exp"} if operator is ops.attention_mapped else {})
    query, key, value = (torch.empty(2, heads, 3, 8, device="meta") for heads in (4, 1, 4))
    assert operator(query, key, key, [], **options).shape == (2, 4, 3, 8)
    with pytest.raises(RuntimeError, match="keys of 1 heads and values of 4"):
        operator(query, key, value, [], **options)


def test_cost_counts_multiply_adds_and_traffic() -> None:
    def function(q: Tensor, k: Tensor) -> Tensor:
        out: Tensor = ops.attention(q, k, k, [], scale=1.0)
        return out

    program = program_of(function, numbers(2, 4, 3, 8), numbers(2, 4, 5, 8))
    node = next(n for n in program.graph.nodes if n.target is ops.attention)
    cost = ops.OPERATORS[ops.attention].cost(node)
    assert cost.flops == 2 * 2 * 4 * 3 * 5 * (8 + 8)
    assert cost.bytes == 4 * (2 * 4 * 3 * 8 * 2 + 2 * 4 * 5 * 8)  # query and result, keys once
    assert cost + cost == ops.Cost(2 * cost.flops, 2 * cost.bytes)
