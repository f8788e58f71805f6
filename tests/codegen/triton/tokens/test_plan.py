"""Kernels of plans, interpreted, beside the definition of ``regraft::plan_merge``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.codegen.rowwise.axes import Unfusable
from regraft.codegen.triton.load import load_kernel
from regraft.codegen.triton.tokens.plan import emit_plan
from regraft.codegen.triton.tokens.plan_spec import MATCHINGS, PlanSpec
from regraft.ir.ops.matchings import SCORED
from regraft.ir.ops.plan_merge import most_removable
from regraft.ir.ops.plan_merge import reference as definition
from tests.codegen.triton.interpreted import Run

FULL, HALF = torch.float32, torch.float16
TILES = (32, 32, 16, 4, 1)


@dataclass(frozen=True)
class Case:
    """Sizes of a plan: of the tokens, ``hidden`` of a sample's are padding and ``broken`` are no numbers."""

    batch: int = 2
    tokens: int = 37
    remove: int = 9
    prefix: int = 1
    suffix: int = 0
    margin: float = 0.3
    heads: int = 3
    hidden: int = 0
    broken: int = 0
    seed: int = 0


def operands(spec: PlanSpec, case: Case) -> dict[str, Any]:
    """Operands of a spec's kernel by name."""
    make = torch.Generator().manual_seed(case.seed)
    heads = (case.heads,) if spec.heads else ()
    metric = torch.randn(case.batch, *heads, case.tokens, spec.width, generator=make).to(spec.dtype)
    order = torch.rand(case.batch, case.tokens, generator=make).argsort(-1)
    if case.broken:
        odd = (order < case.broken).view(case.batch, *(1 for _ in heads), case.tokens, 1)
        metric = metric.masked_fill(odd & (torch.rand(metric.shape, generator=make) < 0.5), torch.nan)
    found: dict[str, Any] = {"metric": metric, "remove": case.remove, "margin": case.margin}
    found |= {"prefix": case.prefix, "suffix": case.suffix}
    if spec.scores:
        found["scores"] = torch.randn(case.batch, case.tokens, generator=make).to(spec.scores)
    if spec.keep:
        found["keep"] = order.flip(-1) >= torch.arange(case.batch)[:, None] * case.hidden
    return {name: found[name] for name in spec.operands}


def wanted(spec: PlanSpec, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What the definition says."""
    metric = given["metric"].mean(1) if spec.heads else given["metric"]
    more = given["remove"], spec.matching, given["prefix"], given["suffix"], spec.causal, given.get("margin", 0.0)
    return definition(metric, given.get("scores"), given.get("keep"), *more)


def compare(run: Run, spec: PlanSpec, given: dict[str, Any]) -> None:
    """The kernel, and the operator on the CPU, give the plan that the definition gives."""
    kernel = emit_plan(spec)
    exact = wanted(spec, given)
    own = load_kernel(kernel).operator(*(given[name] for name in kernel.operands))
    for made in (run(kernel, given, config=TILES), own):
        for name, found, right in zip(("kept", "sources", "slots"), made, exact, strict=True):
            assert found.dtype == torch.int64 and torch.equal(found, right), name


def spec_of(matching: str, dtype: torch.dtype = FULL, **options: Any) -> PlanSpec:
    """A spec of a matching, with the scores that it needs."""
    return PlanSpec(dtype, 20, matching, scores=dtype if matching in SCORED else None, **options)


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("matching", MATCHINGS)
def test_matchings(run: Run, matching: str, dtype: torch.dtype) -> None:
    spec = spec_of(matching, dtype)
    compare(run, spec, operands(spec, Case()))


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("matching", MATCHINGS)
def test_padding_and_what_is_no_number_come_first_or_last(run: Run, matching: str, dtype: torch.dtype) -> None:
    spec = spec_of(matching, dtype, keep=True, heads=True)
    compare(run, spec, operands(spec, Case(batch=3, hidden=8, broken=6, prefix=2, suffix=3)))


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("matching", ["bipartite", "energy", "distinct"])
def test_lengths_whose_squares_leave_the_range(run: Run, matching: str, heads: bool) -> None:
    spec = spec_of(matching, heads=heads)
    given = operands(spec, Case(broken=2))
    exponents = torch.randint(
        -35, 36, (2, *(1 for _ in range(heads)), 37, 1), generator=torch.Generator().manual_seed(1)
    )
    compare(run, spec, given | {"metric": given["metric"] * 10.0**exponents})


@pytest.mark.parametrize("matching", ["bipartite", "energy"])
def test_only_into_later_tokens(run: Run, matching: str) -> None:
    spec = spec_of(matching, causal=True)
    given = operands(spec, Case(remove=14, broken=3))
    compare(run, spec, given)
    kept, sources, slots = run(emit_plan(spec), given, config=TILES)
    into = slots.gather(1, sources)
    assert bool((kept.gather(1, into.clamp(min=0)) > sources)[into >= 0].all())


@pytest.mark.parametrize("matching", MATCHINGS)
def test_ties_go_by_index(run: Run, matching: str) -> None:
    """Tokens that are all alike, or of no length, and have one score."""
    spec = spec_of(matching)
    given = operands(spec, Case())
    for value in (1.0, 0.0):
        same = {name: torch.full_like(x, value) if isinstance(x, Tensor) else x for name, x in given.items()}
        compare(run, spec, same)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    matching=st.sampled_from(MATCHINGS),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 50),
    ends=st.tuples(st.integers(0, 3), st.integers(0, 2)),
    width=st.integers(1, 40),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    bad=st.tuples(st.integers(0, 60), st.integers(0, 9)),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_plan(
    run: Run,
    matching: str,
    batch: int,
    tokens: int,
    ends: tuple[int, int],
    width: int,
    options: tuple[bool, ...],
    bad: tuple[int, int],
    seed: int,
    data: Any,
) -> None:
    heads, keep, half = options
    spec = replace(spec_of(matching, HALF if half else FULL, heads=heads, keep=keep), width=width)
    remove = data.draw(st.integers(0, most_removable(tokens, matching, *ends)))
    compare(run, spec, operands(spec, Case(batch, tokens, remove, *ends, 0.3, 2, *bad, seed)))


@pytest.mark.parametrize("matching", MATCHINGS)
def test_a_sample_depends_on_itself_alone(run: Run, matching: str) -> None:
    spec = spec_of(matching, HALF)
    given = operands(spec, Case(batch=3))
    whole = run(emit_plan(spec), given, config=TILES)
    for sample in range(3):
        alone = {name: x[sample : sample + 1] if isinstance(x, Tensor) else x for name, x in given.items()}
        for part, found in zip(whole, run(emit_plan(spec), alone, config=TILES), strict=True):
            assert torch.equal(part[sample : sample + 1], found)


def test_any_strides(run: Run) -> None:
    spec = PlanSpec(FULL, 20, "drop", heads=True, scores=FULL, keep=True)
    given = operands(spec, Case(hidden=4))
    given["metric"] = given["metric"].transpose(1, 2).contiguous().transpose(1, 2)
    given["scores"] = given["scores"].t().contiguous().t()
    given["keep"] = given["keep"][:1].expand(2, -1)
    compare(run, spec, given)


@pytest.mark.parametrize("matching", MATCHINGS)
def test_the_operator(matching: str) -> None:
    spec = spec_of(matching, keep=True)
    kernel = emit_plan(spec)
    given = operands(spec, Case(hidden=3))
    torch.library.opcheck(load_kernel(kernel).operator._opoverload, tuple(given[name] for name in kernel.operands))


def test_wrong_operands_are_refused() -> None:
    spec = spec_of("bipartite", keep=True)
    launch, given = load_kernel(emit_plan(spec)).launch, operands(spec, Case())
    with pytest.raises(ValueError, match=r"metric is torch\.float16"):
        launch(**given | {"metric": given["metric"].half()})
    with pytest.raises(ValueError, match=r"keep is torch\.bool"):
        launch(**given | {"keep": given["keep"][:, 1:]})
    with pytest.raises(ValueError, match="19 of 37 tokens were to be removed: at most 18 can"):
        launch(**given | {"remove": 19})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"matching": "diverse"}, "one token after the other"),
        ({"matching": "grid"}, "looks at nothing"),
        ({"dtype": torch.float64}, "a metric in torch.float64"),
        ({"scores": torch.float64}, "scores in torch.float64"),
    ],
)
def test_what_has_no_kernel_says_why(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unfusable, match=reason):
        replace(PlanSpec(FULL, 20), **options)
