"""Kernels that bring tokens together and put them back, interpreted, beside the definitions in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.triton.load import load_kernel
from regraft.codegen.triton.rowwise.samples import written
from regraft.codegen.triton.tokens.merge import MergeKernel, MergeSpec, emit_merge_tokens
from regraft.codegen.triton.tokens.unmerge import UnmergeSpec, emit_unmerge
from regraft.ir import ops
from regraft.ir.ops.merge_tokens import reference as merge_definition
from regraft.ir.ops.plan_merge import reference as plan
from regraft.ir.ops.rms_norm import reference as rms_norm
from regraft.ir.ops.unmerge_tokens import reference as unmerge_definition
from tests.codegen.rowwise.support import agree
from tests.codegen.triton.interpreted import Run

FULL, HALF = torch.float32, torch.float16
TILES = (16, 4, 1)
aten = torch.ops.aten


def operands(
    spec: MergeSpec, batch: int = 2, tokens: int = 21, remove: int = 8, matching: str = "bipartite", seed: int = 0
) -> dict[str, Any]:
    """Tokens, sizes and a plan of a matching, by name."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, spec.width, generator=make).to(spec.dtype)
    keep = torch.rand(batch, tokens, generator=make) < 0.9
    scores = torch.randn(batch, tokens, generator=make)
    kept, sources, slots = plan(x, scores, keep, remove, matching, 1, 0, False, 0.0)
    found = {"x": x, "kept": kept, "sources": sources, "slots": slots}
    return found | {"sizes": torch.randint(1, 9, (batch, tokens), generator=make).float()}


def definition(spec: MergeSpec, named: dict[str, Any], wide: bool) -> list[Tensor]:
    """Merged tokens, sizes and, where asked for, their logarithms; computed in fp64 or as models compute them."""
    x = named["x"].double() if wide else named["x"]
    sizes = named["sizes"] if spec.sizes else None
    merged, total = merge_definition(x, sizes, named["kept"], named["sources"], named["slots"])
    return [merged, total, *([total.log()] if spec.logs else [])]


def compare(run: Run, spec: MergeSpec, named: dict[str, Any]) -> None:
    """The kernel and the operator on the CPU beside the definition."""
    kernel = emit_merge_tokens(spec).kernel
    exact, usual = definition(spec, named, True), definition(spec, named, False)
    own = load_kernel(kernel).operator(*(named[name] for name in kernel.operands))
    for made in (run(kernel, named, config=TILES), own):
        assert len(made) == len(usual)
        for result, right, plain in zip(made, exact, usual, strict=True):
            assert result.dtype == plain.dtype and result.shape == plain.shape
            agree(result, right, plain)


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("matching", ["bipartite", "fuse", "drop"])
def test_merging(run: Run, matching: str, dtype: torch.dtype) -> None:
    for sizes in (False, True):
        spec = MergeSpec(dtype, 24, sizes=sizes, logs=sizes)
        compare(run, spec, operands(spec, remove=9, matching=matching))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    width=st.integers(1, 40),
    half=st.booleans(),
    sizes=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_size(run: Run, batch: int, tokens: int, width: int, half: bool, sizes: bool, seed: int, data: Any) -> None:
    spec = MergeSpec(HALF if half else FULL, width, sizes)
    remove = data.draw(st.integers(0, max(0, (tokens - 1) // 2)))
    compare(run, spec, operands(spec, batch, tokens, remove, seed=seed))


def test_what_nothing_comes_to_keeps_its_bits(run: Run) -> None:
    """And so does what only its equals come to; a dropped token counts nowhere, be it no number."""
    spec = MergeSpec(HALF, 24)
    named = operands(spec, matching="drop")
    named["x"].scatter_(1, named["sources"][..., None].expand(-1, -1, 24), torch.nan)
    merged, sizes = run(emit_merge_tokens(spec).kernel, named, config=TILES)
    assert torch.equal(merged, unmerge_definition(named["x"], named["kept"])) and bool((sizes == 1).all())
    alike = operands(spec)
    alike["x"] = alike["x"][:, :1].expand(-1, 21, -1)
    merged, sizes = run(emit_merge_tokens(spec).kernel, alike, config=TILES)
    assert torch.equal(merged, alike["x"][:, :13]) and bool((sizes.sum(1) == 21).all())


def normed(dtype: torch.dtype, width: int, kind: str) -> MergeKernel:
    """A merge with a norm behind it."""

    def layer_norm(build: Any, x: Any, weight: Any, bias: Any) -> list[fx.Node]:
        return [build.call(aten.layer_norm.default, x, [width], weight, bias, 1e-5)]

    def scaled(build: Any, x: Any, weight: Any, bias: Any) -> list[fx.Node]:
        return [build.call(ops.rms_norm, x, weight, 1e-5)]

    calls, _, mode = written(dtype, scaled if kind == "rms" else layer_norm, [(2, 13, width), (width,), (width,)])
    merged = calls[0].args[0]
    assert isinstance(merged, fx.Node)
    return emit_merge_tokens(MergeSpec(dtype, width, sizes=True, logs=True), calls, merged, mode)


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("width", [24, 32])
def test_a_norm_behind_a_merge(run: Run, width: int, kind: str, dtype: torch.dtype) -> None:
    kernel = normed(dtype, width, kind).kernel
    named = operands(MergeSpec(dtype, width, sizes=True, logs=True))
    make = torch.Generator().manual_seed(1)
    named |= {name: torch.randn(width, generator=make).to(dtype) for name in ("weight", "bias")}
    usual = definition(MergeSpec(dtype, width, True, True), named, False)
    weight, bias = named["weight"], named["bias"]

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if kind == "rms":
            return rms_norm(x, weight, 1e-5, 0.0, "before_weight")
        return torch.nn.functional.layer_norm(x, (width,), weight, bias, 1e-5)

    own = load_kernel(kernel).operator(*(named[name] for name in kernel.operands))
    for made in (run(kernel, named, config=TILES), own):
        agree(made[3], norm(made[0].double(), weight.double(), bias.double()), norm(usual[0], weight, bias))
        agree(made[2], usual[1].double().log(), usual[2])


@pytest.mark.parametrize("dtype", [FULL, HALF, torch.bool, torch.int64], ids=str)
def test_putting_back(run: Run, dtype: torch.dtype) -> None:
    spec, make = UnmergeSpec(dtype, 13), torch.Generator().manual_seed(0)
    kernel = emit_unmerge(spec)
    x = (3 * torch.randn(2, 9, 26, generator=make)).to(dtype)[..., ::2]
    slots = torch.randint(-1, 9, (2, 17), generator=make)
    wanted = unmerge_definition(x, slots)
    assert torch.equal(run(kernel, {"x": x, "slots": slots}, config=(4, 8, 4, 1)), wanted)
    assert torch.equal(load_kernel(kernel).operator(x, slots), wanted)


def test_any_strides(run: Run) -> None:
    spec = MergeSpec(FULL, 12, sizes=True)
    named = operands(spec)
    named["x"] = named["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("kept", "slots", "sizes"):
        named[name] = named[name].t().contiguous().t()
    compare(run, spec, named)


def test_the_operators() -> None:
    named = operands(MergeSpec(FULL, 24, True, True))
    named |= {name: torch.randn(24) for name in ("weight", "bias")}
    for kernel in (normed(FULL, 24, "layer").kernel, emit_merge_tokens(MergeSpec(FULL, 24)).kernel):
        torch.library.opcheck(load_kernel(kernel).operator._opoverload, tuple(named[n] for n in kernel.operands))
    back = load_kernel(emit_unmerge(UnmergeSpec(FULL, 24))).operator
    torch.library.opcheck(back._opoverload, (named["x"], named["slots"]))


def test_wrong_operands_are_refused() -> None:
    named = operands(MergeSpec(FULL, 24))
    launch = load_kernel(emit_merge_tokens(MergeSpec(FULL, 24)).kernel).launch
    given_names = ("x", "kept", "sources", "slots")
    with pytest.raises(ValueError, match=r"kept is torch\.int64"):
        launch(**{name: named[name] for name in given_names} | {"kept": named["kept"][:, 1:]})
    with pytest.raises(ValueError, match=r"x is torch\.float16"):
        launch(**{name: named[name] for name in given_names} | {"x": named["x"].half()})
    with pytest.raises(ValueError, match=r"slots are torch\.int64"):
        load_kernel(emit_unmerge(UnmergeSpec(FULL, 24))).launch(named["x"], named["slots"][:1])


def test_what_has_no_kernel_says_why() -> None:
    with pytest.raises(Unfusable, match="wider than a program holds"):
        MergeSpec(FULL, 9000)
    with pytest.raises(Unfusable, match=r"tokens in torch\.float64"):
        MergeSpec(torch.float64, 24)
    with pytest.raises(Unfusable, match=r"tokens in torch\.complex64"):
        UnmergeSpec(torch.complex64, 24)
