"""The decode kernels, interpreted, against the formula in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.codegen.triton.attention_decode import emit_decode
from regraft.codegen.triton.attention_layout import KeyLayout
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.load import load_kernel
from regraft.ir.mask import parse, to_dense
from tests.codegen.triton.formula import agree, formula, operands
from tests.codegen.triton.interpreted import Run

TILES = (32, 16, 4, 1)
FP32, FP16 = torch.float32, torch.float16
LAST = "band(None,key_len - query_len)"  # the last query sees the last key


def compare(
    run: Run, spec: AttentionSpec, given: dict[str, Any], masks: list[Tensor] | None = None, splits: int = 3
) -> None:
    """The kernel on keys in one piece beside the formula."""
    named = {**given, **{f"mask_{n}": mask for n, mask in enumerate(masks or [])}}
    result = run(emit_decode(spec), named, config=TILES, splits=splits)
    wanted, lse = formula(spec, given, masks or [])
    agree(result[0] if spec.lse else result, wanted, spec.dtype)
    if spec.lse:
        agree(result[1], lse, FP32)


@settings(max_examples=14, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 2, 7, 5, 90))),
    dims=st.tuples(st.sampled_from([1, 16, 24]), st.sampled_from([8, 16, 33])),
    mask=st.sampled_from(["all", LAST, f"{LAST} & band(key_len - query_len - 9,None)", "prefix(4) | band(60,None)"]),
    splits=st.integers(1, 9),
    half=st.booleans(),
    options=st.sets(st.sampled_from(["slopes", "sinks", "softcap", "lse"])),
    bias=st.sampled_from(["none", "none", "dense", "keys"]),
)
def test_any_size_and_any_combination(
    run: Run, sizes: tuple[int, ...], dims: tuple[int, int], mask: str, splits: int, half: bool, options: set[str],
    bias: str,
) -> None:  # fmt: skip
    """Any group of heads, one query or a few, more programs than tiles of keys."""
    flags = {name: True for name in options}
    spec = AttentionSpec(FP16 if half else FP32, *dims, mask, empty_rows="zero", bias=bias, **flags)
    compare(run, spec, operands(spec, *sizes), splits=splits)


def test_more_rows_than_a_tile(run: Run) -> None:
    spec = AttentionSpec(FP32, 16, 16, LAST)
    compare(run, spec, operands(spec, 1, 2, 5, 9, 40))


def test_heads_that_share_keys_have_masks_of_their_own(run: Run) -> None:
    """Two of three heads see a window, the third all that came before."""
    mask = f"{LAST} & (heads(2,3) | band(key_len - query_len - 7,None))"
    spec = AttentionSpec(FP32, 16, 16, mask, lse=True)
    compare(run, spec, operands(spec, 2, 1, 3, 2, 70))
    mask = f"{LAST} & (~heads(0,2) & keys(0) | heads(0,2) & ~keys(0))"
    spec = AttentionSpec(FP32, 16, 16, mask, empty_rows="nan", lse=True)
    compare(run, spec, operands(spec, 2, 1, 3, 2, 70), [(torch.arange(140).reshape(2, 70) % 3 == 0)])


def tree(parents: list[int]) -> Tensor:
    """Words of ancestors ``[1, nodes, words]`` of a tree whose node ``n`` hangs on ``parents[n]``; -1 is the root."""
    words = torch.zeros(1, len(parents), (len(parents) + 63) // 64, dtype=torch.int64)
    for node in range(len(parents)):
        place = node
        while place >= 0:
            words[0, node, place // 64] |= torch.tensor(1 << place % 64 if place % 64 < 63 else -(1 << 63))
            place = parents[place]
    return words


@pytest.mark.parametrize("nodes", [1, 7, 70])
def test_a_tree_of_drafts_sees_its_ancestors(run: Run, nodes: int) -> None:
    parents = [(node - 1) // 3 if node else -1 for node in range(nodes)]
    spec = AttentionSpec(FP32, 16, 16, "prefix(key_len - query_len) | bits(0)")
    compare(run, spec, operands(spec, 1, 1, 2, nodes, nodes + 25), [tree(parents)])


@pytest.mark.parametrize(("weight", "normaliser"), [("sigmoid", "none"), ("relu", "sum_abs"), ("elu1", "sum_eps")])
def test_weights_without_softmax(run: Run, weight: str, normaliser: str) -> None:
    spec = AttentionSpec(FP32, 16, 16, LAST, weight=weight, normaliser=normaliser, constant=0.5)
    compare(run, spec, operands(spec, 2, 1, 3, 2, 70))


def in_pages(tensor: Tensor, pages: Tensor, page_size: int) -> Tensor:
    """``[batch, heads, keys, dim]`` laid into a cache ``[pages, heads, page_size, dim]``; free places are NaN."""
    cache = torch.full((int(pages.max()) + 2, tensor.shape[1], page_size, tensor.shape[3]), torch.nan).to(tensor.dtype)
    for batch in range(tensor.shape[0]):
        for key in range(tensor.shape[2]):
            cache[pages[batch, key // page_size], :, key % page_size] = tensor[batch, :, key]
    return cache


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
@pytest.mark.parametrize("mask", ["all", LAST, "prefix(key_len - query_len) | bits(0)"])
def test_keys_in_pages(run: Run, page_size: int, mask: str) -> None:
    """Each batch has its own length, and ``key_len`` is that; what lies behind it is never read as a number."""
    spec = AttentionSpec(FP32, 16, 16, mask, lse=True)
    lengths = [41, 7]
    count = -(-max(lengths) // page_size)
    pages = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0)).reshape(2, count).int()
    given = operands(spec, 2, 2, 3, 3, count * page_size)
    words = tree([-1, 0, 0]).expand(2, -1, -1)
    seen = torch.zeros(2, 6, 3, count * page_size, dtype=torch.bool)
    for batch, length in enumerate(lengths):
        seen[batch, ..., :length] = to_dense(parse(mask), [words[batch]], 1, 6, 3, length)[0]
    named = {**given, "pages": pages, "lengths": torch.tensor(lengths, dtype=torch.int32), "mask_0": words}
    for name in ("key", "value"):
        cache = given[name].clone()
        for batch, length in enumerate(lengths):
            cache[batch, :, length:] = torch.nan
        named[name] = in_pages(cache, pages, page_size)
    result, result_lse = run(emit_decode(spec, KeyLayout("paged", page_size)), named, config=TILES, splits=2)
    wanted, lse = formula(spec, given, [], seen)
    agree(result, wanted, FP32)
    agree(result_lse, lse, FP32)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_listed_keys(run: Run, page_size: int) -> None:
    """Each batch and group of heads reads its own blocks, in any order; -1 lists none, and the mask still holds."""
    spec = AttentionSpec(FP32, 16, 16, LAST, empty_rows="zero")
    given = operands(spec, 2, 2, 3, 2, 50)
    blocks = -(-50 // page_size)
    make = torch.Generator().manual_seed(0)
    pages = torch.stack([torch.randperm(blocks, generator=make)[: blocks // 2 + 1] for _ in range(4)])
    pages = pages.reshape(2, 2, -1).int()
    pages[0, 1, 0] = -1
    listed = torch.zeros(2, 2, blocks + 1, dtype=torch.bool).scatter_(2, pages.long() % (blocks + 1), True)[
        ..., :blocks
    ]
    listed = listed.repeat_interleave(page_size, 2)[..., :50].repeat_interleave(3, 1)[:, :, None]
    seen = to_dense(parse(LAST), [], 2, 6, 2, 50) & listed
    result = run(emit_decode(spec, KeyLayout("indexed", page_size)), {**given, "pages": pages}, config=TILES, splits=2)
    agree(result, formula(spec, given, [], seen)[0], FP32)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "indexed"])
def test_the_operator(kind: str) -> None:
    """Fake, schema and CPU kernel agree, and the CPU kernel with the formula, however keys lie."""
    spec = AttentionSpec(FP32, 16, 24, LAST, empty_rows="zero", sinks=True, lse=True)
    kernel = emit_decode(spec, KeyLayout(kind, 0 if kind == "contiguous" else 4))
    given = operands(spec, 2, 2, 3, 2, 12)
    seen = to_dense(parse(LAST), [], 2, 6, 2, 12)
    named: dict[str, Any] = dict(given)
    if kind == "paged":
        pages = torch.tensor([[4, 1, 3], [0, 5, 2]], dtype=torch.int32)
        named |= {"pages": pages, "lengths": torch.tensor([12, 5], dtype=torch.int32)}
        named |= {name: in_pages(given[name], pages, 4) for name in ("key", "value")}
        for name in ("key", "value"):
            named[name][5, :, 1:] = torch.nan  # the second batch has 5 keys: what lies behind them is not read
        seen[1] = False
        seen[1, ..., :5] = to_dense(parse(LAST), [], 1, 6, 2, 5)[0]
    elif kind == "indexed":
        named["pages"] = torch.tensor([[[0, 2], [-1, 1]], [[2, -1], [1, 0]]], dtype=torch.int32)
        listed = torch.tensor([[[1, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]], dtype=torch.bool)
        seen &= listed.repeat_interleave(4, 2).repeat_interleave(3, 1)[:, :, None]
    arguments = tuple(named[name] for name in kernel.operands)
    operator = load_kernel(kernel).operator
    out, lse = operator(*arguments)
    wanted, wanted_lse = formula(spec, given, [], seen)
    agree(out, wanted, FP32)
    agree(lse, wanted_lse, FP32)
    torch.library.opcheck(operator, arguments)


def test_one_logit_a_head() -> None:
    spec = AttentionSpec(FP32, 16, 16, sinks=True)
    given = operands(spec, 1, 1, 2, 1, 4) | {"sinks": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"sinks \(3,\): expected one for each of 2 heads"):
        load_kernel(emit_decode(spec)).launch(*(given[name] for name in ("query", "key", "value", "sinks", "scale")))
