"""Predicates against formulas written out in numpy, entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.ir.mask import (
    CAUSAL,
    And,
    Band,
    Bits,
    Chunk,
    Dense,
    Everything,
    Heads,
    Keys,
    Lengths,
    Not,
    Nothing,
    Or,
    Predicate,
    Prefix,
    Rows,
    Same,
    band,
    chunk,
    every_row_nonempty,
    heads,
    intervals,
    is_causal,
    parse,
    prefix,
    simplify,
    to_dense,
)  # fmt: skip

BATCH, HEADS = 2, 2
bounds = st.one_of(st.none(), st.integers(-8, 8), st.builds(lambda c: f"key_len - query_len + {c}", st.integers(0, 3)))
atoms = st.one_of(
    st.builds(band, bounds, bounds),
    st.builds(prefix, st.one_of(st.integers(0, 9), st.just("key_len - 2"))),
    st.builds(chunk, st.integers(1, 4), st.integers(0, 3)),
    st.sampled_from(
        [Everything(), Nothing(), Lengths(0), Keys(1), Rows(2), Same(2, 1), Dense(3), heads(1, 3), Bits(4)]
    ),
)
predicates = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(lambda parts: And(tuple(parts)), st.lists(inner, min_size=2, max_size=3)),
        st.builds(lambda parts: Or(tuple(parts)), st.lists(inner, min_size=2, max_size=3)),
    ),
    max_leaves=8,
)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31))


def tensors_for(rows: int, columns: int, seed: int) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, columns + 2, (BATCH,), generator=make),
        torch.randint(0, 3, (BATCH, columns), generator=make),
        torch.randint(0, 3, (BATCH, rows), generator=make),
        torch.randint(0, 2, (BATCH, HEADS, rows, columns), generator=make).bool(),
        torch.randint(-(2**63), 2**63 - 1, (BATCH, rows, 1), generator=make),
    ]


def formula(p: Predicate, t: list[np.ndarray], b: int, h: int, q: int, k: int, n: dict[str, int]) -> bool:
    match p:
        case Band(lower, upper):
            return (lower is None or k - q >= lower.evaluate(n)) and (upper is None or k - q <= upper.evaluate(n))
        case Prefix(length):
            return k < length.evaluate(n)
        case Chunk(size, offset):
            return (q + offset.evaluate(n)) // size == k // size
        case Everything() | Nothing():
            return isinstance(p, Everything)
        case Lengths(i):
            return bool(k < t[i][b])
        case Keys(i):
            return bool(t[i][b, k])
        case Rows(i):
            return bool(t[i][b, q])
        case Same(i, j):
            return bool(t[i][b, q] == t[j][b, k])
        case Dense(i):
            return bool(t[i][b, h, q, k])
        case Heads(first, last):
            return first <= h < last
        case Bits(i):
            place = k - (n["key_len"] - n["query_len"])
            return place >= 0 and bool(int(t[i][b, q, 0]) >> place & 1)
        case Not(inner):
            return not formula(inner, t, b, h, q, k, n)
        case And(parts):
            return all(formula(part, t, b, h, q, k, n) for part in parts)
        case Or(parts):
            return any(formula(part, t, b, h, q, k, n) for part in parts)
    raise TypeError(p)


def by_formula(p: Predicate, tensors: list[torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    arrays = [tensor.numpy() for tensor in tensors]
    names = {"query_len": rows, "key_len": columns}
    out = np.zeros((BATCH, HEADS, rows, columns), dtype=bool)
    for b, h, q, k in np.ndindex(out.shape):
        out[b, h, q, k] = formula(p, arrays, b, h, q, k, names)
    return torch.from_numpy(out)


@given(predicates, sizes)
@settings(max_examples=300, deadline=None)
def test_dense_is_the_formula(p: Predicate, size: tuple[int, int, int]) -> None:
    rows, columns, seed = size
    tensors = tensors_for(rows, columns, seed)
    assert torch.equal(to_dense(p, tensors, BATCH, HEADS, rows, columns), by_formula(p, tensors, rows, columns))


@given(predicates)
@settings(max_examples=500, deadline=None)
def test_text_and_back(p: Predicate) -> None:
    assert parse(str(p)) == p


@given(predicates, sizes, st.booleans())
@settings(max_examples=800, deadline=None)
def test_simplify_keeps_the_meaning(p: Predicate, size: tuple[int, int, int], known: bool) -> None:
    rows, columns, seed = size
    tensors = tensors_for(rows, columns, seed)
    plain = simplify(p, rows, columns) if known else simplify(p)
    want = to_dense(p, tensors, BATCH, HEADS, rows, columns)
    assert torch.equal(to_dense(plain, tensors, BATCH, HEADS, rows, columns), want)
    again = simplify(plain, rows, columns) if known else simplify(plain)
    assert torch.equal(to_dense(again, tensors, BATCH, HEADS, rows, columns), want)


@given(predicates, sizes)
@settings(max_examples=500, deadline=None)
def test_proofs_hold(p: Predicate, size: tuple[int, int, int]) -> None:
    rows, columns, seed = size
    tensors = tensors_for(rows, columns, seed)
    tensors[1] = tensors[2] if rows == columns else tensors[1]
    dense = to_dense(p, tensors, BATCH, HEADS, rows, columns)
    if every_row_nonempty(p, rows, columns) or every_row_nonempty(p):
        assert bool(dense.any(-1).all())
    if is_causal(p):
        assert torch.equal(dense[0, 0], torch.ones(rows, columns).tril().bool())


@given(
    st.lists(st.one_of(atoms, st.just(Not(Lengths(0))), st.just(Not(prefix(2)))), min_size=2, max_size=4),
    sizes,
)
@settings(max_examples=300, deadline=None)
def test_intervals_are_the_mask(parts: list[Predicate], size: tuple[int, int, int]) -> None:
    rows, columns, seed = size
    tensors = tensors_for(rows, columns, seed)
    p = And(tuple(parts))
    found = intervals(p, rows, columns, tensors)
    if found is None:
        assert any(isinstance(part, (Keys, Rows, Same, Dense, Heads, Bits)) for part in parts)
        return
    start, end = found
    key = torch.arange(columns)
    mask = (key >= start[..., None]) & (key < end[..., None])
    dense = to_dense(p, tensors, BATCH, HEADS, rows, columns)
    assert torch.equal(mask[:, None].expand_as(dense), dense)
    assert bool((start <= end).all())


@pytest.mark.parametrize(
    "text", ["", "band(1)", "keys(a)", "band(None,0) &", "foo(1)", "~", "(all", "all all", "chunk(0)"]
)
def test_wrong_text_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


def test_near_causal_is_not_causal() -> None:
    assert is_causal(CAUSAL) and is_causal(parse("all & band(None,0)"))
    for text in [
        "band(None,1)",
        "band(None,-1)",
        "band(-4,0)",
        "band(None,0) & keys(0)",
        "band(None,0) | dense(0)",
    ]:
        assert not is_causal(parse(text))
    assert is_causal(parse("band(None,key_len - query_len)"), "key_len - query_len")


def test_rows() -> None:
    assert every_row_nonempty(CAUSAL)
    assert not every_row_nonempty(band(None, -1))
    assert not every_row_nonempty(band(-4, 0))  # more queries than keys would leave rows empty
    assert every_row_nonempty(band(-4, 0), 9, 9)
    assert not every_row_nonempty(parse("band(None,0) & keys(0)"), 9, 9)
    assert every_row_nonempty(parse("band(None,0) & same(0,0)"), 9, 9)
