"""Lowered attention equals its formula in fp64, whatever the mask, and whatever is known of it only at run time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.codegen.cpu import attention as lowering
from regraft.codegen.cpu import attention_blocks, attention_parts
from regraft.codegen.cpu.lower import lower
from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.ir.ops.attention import attention
from regraft.ir.verify import relative_l2
from tests.support import captured

LOWEST = torch.finfo(torch.float32).min
BATCH, HEADS, LENGTH, KEYS, SIZE = 2, 4, 5, 5, 8
Allowed = Callable[[int, int, int], bool]


@pytest.fixture(autouse=True, params=["native", "sdpa"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on both kernels; what one cannot express falls to the definition."""
    name = str(request.param)
    if name == "native" and NATIVE.missing():
        pytest.skip(NATIVE.missing())
    monkeypatch.setattr(lowering, "native_can" if name == "sdpa" else "sdpa_can", lambda given: False)
    return name


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def operands(kv_heads: int = HEADS, keys: int = KEYS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    query = draw(BATCH, HEADS, LENGTH, SIZE)
    return tuple(
        t.to(dtype)
        for t in (query, draw(BATCH, kv_heads, keys, SIZE, seed=1), draw(BATCH, kv_heads, keys, SIZE, seed=2))
    )


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Allowed = lambda b, q, k: True,
    *,
    scale: float = 0.5,
    fill: float = -math.inf,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    empty: float = math.nan,
) -> Tensor:
    """Row by row, number by number."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    groups = query.shape[1] // key.shape[1]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        row = scale * (key[b, h // groups].double() @ query[b, h, i].double())
        row = softcap * torch.tanh(row / softcap) if softcap else row
        for k in range(len(row)):
            row[k] += 0.0 if bias is None else bias.double().expand(BATCH, HEADS, LENGTH, len(row))[b, h, i, k]
            row[k] += 0.0 if slopes is None else slopes[h].double() * (k - i)
            row[k] = row[k] if allowed(b, i, k) else fill
        sink = [] if sinks is None else [sinks[h].double()]
        weights = torch.softmax(torch.stack([*row, *sink]), 0)[: len(row)]
        if fill == -math.inf and sinks is None and not any(allowed(b, i, k) for k in range(len(row))):
            out[b, h, i] = empty
        else:
            out[b, h, i] = weights @ value[b, h // groups].double()
    return out


def compiled(args: tuple[Tensor, ...], **options: Any) -> Callable[..., Tensor]:
    """The operator on query, key, value and one tensor that the mask reads, lowered."""
    names = [name for name in ("bias", "slopes", "sinks") if options.get(name) is not None]
    extra = tuple(options.pop(name) for name in names)
    count = len(args)

    def site(*given: Tensor) -> Tensor:
        named = dict(zip(names, given[count:], strict=True))
        out: Tensor = attention(
            *given[:3], list(given[3:count]), named.get("bias"), named.get("slopes"), named.get("sinks"), **options
        )
        return out

    executable = lower(captured(site, (*args, *extra)))
    return lambda *given: executable(*given, *extra)[0]  # type: ignore[no-any-return]


def assert_close(result: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert relative_l2(result.double(), expected) <= tolerance


def lower_left(b: int, q: int, k: int) -> bool:
    return k <= q


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("mask", "allowed"),
    [
        ("all", lambda b, q, k: True),
        ("band(None,0)", lower_left),
        ("band(-2,0)", lambda b, q, k: q - 2 <= k <= q),
        ("band(None,0) | prefix(2)", lambda b, q, k: k <= q or k < 2),
        ("band(-1,1)", lambda b, q, k: abs(q - k) <= 1),
    ],
)
def test_masks_of_positions(mask: str, allowed: Allowed, kv_heads: int) -> None:
    given = operands(kv_heads)
    assert_close(compiled(given, scale=0.5, mask=mask)(*given), formula(*given, allowed))


@pytest.mark.parametrize("keys", [3, 9])
@pytest.mark.parametrize("mask", ["all", "band(None,0)", "band(None,2)"])
def test_more_or_fewer_keys_than_queries(mask: str, keys: int) -> None:
    given = operands(2, keys)
    last = {"all": 99, "band(None,0)": 0, "band(None,2)": 2}[mask]
    assert_close(compiled(given, scale=0.5, mask=mask)(*given), formula(*given, lambda b, q, k: k - q <= last))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
@pytest.mark.parametrize(("mask", "past"), [("keys(0)", False), ("band(None,0) & keys(0)", True)])
def test_a_batch_with_and_without_padding(mask: str, past: bool, kind: torch.dtype) -> None:
    """Padding is looked at in each call: whichever batch it was compiled with, both give the formula's numbers."""
    full, padded = torch.ones(BATCH, KEYS), torch.ones(BATCH, KEYS)
    padded[1, 3:] = 0
    given = operands(2)
    for example in (full, padded):
        run = compiled((*given, example.to(kind)), scale=0.5, mask=mask)
        for keep in (full, padded):
            expected = formula(*given, lambda b, q, k, keep=keep: bool(keep[b, k]) and (k <= q or not past))
            assert_close(run(*given, keep.to(kind)), expected)


@pytest.mark.parametrize("masked_by", ["keys", "bias"])
@pytest.mark.parametrize(
    ("fill", "rows", "value"),
    [(None, "nan", math.nan), (None, "zero", 0.0), (LOWEST, "nan", 0.0), (-1e4, "nan", 0.0), (-3.0, "nan", 0.0)],
)
def test_rows_without_any_key(fill: float | None, rows: str, value: float, masked_by: str) -> None:
    """NaN, zero, or the mean of all values, as the source of the mask wrote it."""
    given = operands(2)
    keep = torch.ones(BATCH, KEYS)
    keep[1] = 0
    if masked_by == "bias" and fill is None:
        bias = torch.where(keep.bool(), 0.0, -math.inf)[:, None, None]
        if rows == "zero":
            pytest.skip("only PyTorch's own attention gives zero, and its mask is no bias")
        result = compiled(given, scale=0.5, bias=bias, empty_rows=rows)(*given)
    else:
        options = {"scale": 0.5, "mask": "keys(0)", "mask_fill": fill, "empty_rows": rows}
        result = compiled((*given, torch.ones(BATCH, KEYS)), **options)(*given, keep)
    kept = formula(*given, lambda b, q, k: bool(keep[b, k]), fill=-math.inf if fill is None else fill, empty=value)
    assert_close(result, kept)
    assert bool(torch.isnan(result[1]).all()) == (fill is None and rows == "nan")


def test_a_row_without_keys_beside_a_bias() -> None:
    given, bias, keep = operands(), draw(1, HEADS, LENGTH, KEYS, seed=5), torch.ones(BATCH, KEYS)
    keep[1] = 0
    run = compiled((*given, torch.ones(BATCH, KEYS)), scale=0.5, mask="keys(0)", mask_fill=LOWEST, bias=bias)
    assert_close(run(*given, keep), formula(*given, lambda b, q, k: b == 0, fill=LOWEST, bias=bias))


@pytest.mark.parametrize("fill", [-2.0, -50.0, -1e4, LOWEST])
def test_a_mask_value_replaces_the_score(fill: float) -> None:
    given, keep = operands(), torch.ones(BATCH, KEYS)
    keep[:, 2] = 0
    run = compiled((*given, keep), scale=0.5, mask="band(None,0) & keys(0)", mask_fill=fill)
    assert_close(run(*given, keep), formula(*given, lambda b, q, k: k <= q and k != 2, fill=fill))


@pytest.mark.parametrize("shape", [(1, 1, LENGTH, KEYS), (1, HEADS, LENGTH, KEYS), (BATCH, 1, 1, KEYS)])
@pytest.mark.parametrize("mask", ["all", "band(None,0)"])
def test_biases(mask: str, shape: tuple[int, ...]) -> None:
    given, bias = operands(2), draw(*shape, seed=5)
    allowed = lower_left if mask != "all" else (lambda b, q, k: True)
    assert_close(compiled(given, scale=0.5, mask=mask, bias=bias)(*given), formula(*given, allowed, bias=bias))


def test_a_bias_that_is_not_dense_in_the_keys() -> None:
    given, bias = operands(), draw(1, HEADS, KEYS, LENGTH, seed=5).transpose(-1, -2)
    assert_close(compiled(given, scale=0.5, bias=bias)(*given), formula(*given, bias=bias))


@pytest.mark.parametrize("mask", ["all", "band(None,0)"])
def test_slopes_and_sinks(mask: str) -> None:
    given, numbers = operands(2), draw(HEADS, seed=6)
    allowed = lower_left if mask != "all" else (lambda b, q, k: True)
    for name in ("slopes", "sinks"):
        run = compiled(given, scale=0.5, mask=mask, **{name: numbers})
        assert_close(run(*given), formula(*given, allowed, **{name: numbers}))


@pytest.mark.parametrize("fill", [None, LOWEST, -1e4, -3.0])
def test_a_sink_takes_all_of_a_row_without_keys(fill: float | None) -> None:
    given, sinks, keep = operands(2), draw(HEADS, seed=6), torch.ones(BATCH, KEYS)
    run = compiled((*given, keep), scale=0.5, mask="keys(0)", mask_fill=fill, sinks=sinks)
    keep[1] = 0
    number = -math.inf if fill is None else fill
    assert_close(run(*given, keep), formula(*given, lambda b, q, k: b == 0, fill=number, sinks=sinks))


def test_softcap_and_everything_at_once() -> None:
    given, bias, slopes = operands(2), draw(1, HEADS, LENGTH, KEYS, seed=5), draw(HEADS, seed=6)
    options: dict[str, Any] = {"bias": bias, "slopes": slopes, "softcap": 2.0}
    run = compiled(given, scale=0.5, mask="band(None,0)", **options)
    assert_close(run(*given), formula(*given, lower_left, **options))


LOW_BIAS = draw(1, HEADS, LENGTH, KEYS, seed=5).bfloat16()


@pytest.mark.parametrize("options", [{}, {"mask": "band(None,0)"}, {"softcap": 3.0}, {"bias": LOW_BIAS}])
def test_bf16_keeps_its_type(options: dict[str, Any]) -> None:
    given = operands(2, dtype=torch.bfloat16)
    result = compiled(given, scale=0.5, **options)(*given)
    allowed = lower_left if "mask" in options else (lambda b, q, k: True)
    assert result.dtype == torch.bfloat16
    named = {name: value for name, value in options.items() if name != "mask"}
    assert_close(result, formula(*given, allowed, **named), 1e-2)


def test_values_of_another_size_than_keys() -> None:
    query, key, _ = operands()
    value = draw(BATCH, HEADS, KEYS, 3, seed=7)
    wide = torch.cat([value, torch.zeros(BATCH, HEADS, KEYS, SIZE - 3)], -1)
    for options in ({}, {"sinks": draw(HEADS, seed=6)}):
        result = compiled((query, key, value), scale=0.5, **options)(query, key, value)
        assert_close(result, formula(query, key, wide, **options)[..., :3])


def test_sites_with_equal_masks_make_one(kernel: str) -> None:
    given, keep = operands(), torch.ones(BATCH, KEYS)

    def two(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        options: dict[str, Any] = {"scale": 0.5, "mask": "keys(0)"}
        once = attention(query, key, value, [keep], **options)
        twice: Tensor = attention(once, key, value, [keep], **options)
        return twice

    executable = lower(captured(two, (*given, keep)))
    names = [getattr(node.target, "__name__", "") for node in executable.module.graph.nodes]
    masks = ["padding_mask"] if kernel == "native" else ["mask_if", "any_padding"]
    assert [names.count(name) for name in masks] == [1] * len(masks)
    assert names.count(f"attend_{kernel}") == 2


SINK_WINDOW = "band(None,0) & (prefix(1) | band(-1,None))"
SPANS: dict[str, tuple[str, Callable[[int, int, int, int], bool]]] = {
    "sink and window": (SINK_WINDOW, lambda b, h, q, k: k <= q and (k < 1 or k > q - 2)),
    "half of the heads local": (
        "band(None,0) & (heads(2,4) | band(-1,None))",
        lambda b, h, q, k: k <= q and (h >= 2 or k > q - 2),
    ),
    "documents": ("same(0,0) & band(None,0)", lambda b, h, q, k: DOCUMENTS[b][q] == DOCUMENTS[b][k] and k <= q),
    "rows": ("rows(0) | band(0,0)", lambda b, h, q, k: bool(DOCUMENTS[b][q]) or k == q),
}
DOCUMENTS = [[0, 0, 1, 1, 1], [3, 3, 3, 3, 0]]


@pytest.mark.parametrize("name", SPANS)
def test_masks_of_several_spans_are_no_tensor_of_all_scores(name: str, kernel: str) -> None:
    text, allowed = SPANS[name]
    given = operands(2)
    masks = (torch.tensor(DOCUMENTS),) if "(0" in text.replace("band(0", "") else ()
    expected = torch.stack(
        [formula(*given, lambda b, q, k, h=h: allowed(b, h, q, k))[:, h] for h in range(HEADS)], dim=1
    )
    run = compiled((*given, *masks), scale=0.5, mask=text)
    assert_close(run(*given, *masks), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sites_that_the_native_kernel_does_not_take_run_in_blocks(
    dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_blocks, "_WORTH_BLOCKS", LENGTH * KEYS)
    given = operands(2, dtype=dtype)

    def site(*args: Tensor) -> Tensor:
        out: Tensor = attention(*args, [], scale=0.5, mask=SINK_WINDOW)
        return out

    executable = lower(captured(site, given))
    names = [getattr(node.target, "__name__", "") for node in executable.module.graph.nodes]
    assert ("attend_blocks" in names) == (kernel == "sdpa")
    allowed = SPANS["sink and window"][1]
    expected = formula(*given, lambda b, q, k: allowed(b, 0, q, k))
    assert_close(executable(*given)[0], expected, 1e-6 if dtype == torch.float32 else 1e-2)


def test_a_long_site_with_a_bias_is_not_taken_to_blocks(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's kernel reads a tensor of all scores that is there anyway; blocks would run the definition."""
    monkeypatch.setattr(attention_blocks, "_WORTH_BLOCKS", LENGTH * KEYS)
    given, bias = operands(2), draw(LENGTH, KEYS, seed=5)

    def site(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = attention(query, key, value, [], bias, scale=0.5)
        return out

    executable = lower(captured(site, (*given, bias)))
    names = [getattr(node.target, "__name__", "") for node in executable.module.graph.nodes]
    assert f"attend_{kernel}" in names and "attend_blocks" not in names
    assert_close(executable(*given, bias)[0], formula(*given, bias=bias[None, None]))


def test_documents_in_many_pieces_are_bits_and_say_so(
    kernel: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention_parts._say_bits.cache_clear()
    monkeypatch.setattr(attention_parts, "MOST_SPANS", 2)
    monkeypatch.setitem(attention_parts.spans.__globals__, "MOST_SPANS", 2)
    given, pieces = operands(2), torch.tensor([[0, 1, 0, 1, 0], [0, 0, 1, 1, 0]])
    run = compiled((*given, pieces), scale=0.5, mask="same(0,0) & keys(0)")
    with caplog.at_level("INFO", logger="regraft"):
        out = run(*given, pieces)
    numbers = pieces.tolist()
    assert_close(out, formula(*given, lambda b, q, k: numbers[b][q] == numbers[b][k] != 0))
    assert ("runs of keys" in caplog.text) == (kernel == "native")


@pytest.mark.parametrize("stride", [1, 3])
def test_a_constant_mask_that_nothing_reads_is_looked_at_once(stride: int, kernel: str) -> None:
    """A dilated pattern: a few runs of keys a row, found when the model is lowered."""
    if kernel != "native":
        pytest.skip("PyTorch's kernel takes the tensor")
    place = torch.arange(LENGTH)
    distance = place[:, None] - place
    pattern = (distance >= 0) & (distance % stride == 0)

    class Patterned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("pattern", pattern)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
            return attention(query, key, value, [self.pattern], scale=0.5, mask="dense(0)")

    given = operands(2)
    executable = lower(captured(Patterned(), given))
    names = [getattr(node.target, "__name__", "") for node in executable.module.graph.nodes]
    assert "attend_native" in names and "score_mask" not in names
    assert_close(executable(*given)[0], formula(*given, lambda b, q, k: bool(pattern[q, k])))


def test_a_condition_of_a_batch_is_no_tensor_of_all_scores(kernel: str) -> None:
    given, both = operands(2), torch.tensor([1, 0]).reshape(2, 1, 1, 1)
    mask = "band(None,0) | dense(0)"
    run = compiled((*given, both), scale=0.5, mask=mask)
    assert_close(run(*given, both), formula(*given, lambda b, q, k: k <= q or b == 0))
    assert_close(run(*given, 1 - both), formula(*given, lambda b, q, k: k <= q or b == 1))
