"""The compiled module: the original's behaviour, whatever happens to shapes, weights, modes and buffers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import regraft
from regraft.build import Toolchain
from regraft.compiled import CompiledModule
from regraft.errors import ArtifactError, CaptureError, InputError, OptionError, TargetError
from regraft.ir.driver import Session
from regraft.ir.program import Program


class Nothing:
    """A pipeline without passes."""

    def run(self, program: Program, session: Session) -> dict[str, float]:
        return {}


PLAIN = Toolchain(lambda target: Nothing(), lambda program, session: program.callable())


def plain(model: nn.Module, example: Any = None, **options: Any) -> CompiledModule:
    return regraft.compile(model, example, toolchain=PLAIN, **options)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).eval()


def events(fast: CompiledModule) -> list[str]:
    return [event.kind for event in fast.report.events]


def assert_same(fast: CompiledModule, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        assert torch.allclose(fast(*args, **kwargs), model(*args, **kwargs), rtol=1e-5, atol=1e-6)


def test_the_whole_chain_agrees_with_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)).eval()
    x = torch.randn(2, 8)
    fast = regraft.compile(model, x)
    assert_same(fast, model, x)
    assert len(fast.entries) == 1 and fast.report.within_tolerance and events(fast) == []
    assert next(iter(fast.report.phases)) == "capture" and fast.report.operators_before


class Counter(nn.Module):
    """A model that counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * 2 + self.calls


@pytest.mark.parametrize(("model", "runs"), [(nn.GELU(), [1, 2]), (Counter(), [2, 3])])
def test_the_call_that_led_to_a_compilation_is_answered_by_the_run_that_was_compared(
    model: nn.Module, runs: list[int]
) -> None:
    counted = 0

    def lower(program: Program, session: Session) -> Any:
        def run(*inputs: Any) -> Any:
            nonlocal counted
            counted += 1
            return program.callable()(*inputs)

        return run

    x = torch.randn(2, 4)
    expected = copy.deepcopy(model.eval())(x)
    fast = regraft.compile(model.eval(), toolchain=Toolchain(PLAIN.pipeline, lower))
    first = fast(x)
    assert torch.equal(first, expected) and counted == runs[0]
    first.zero_()  # the caller's own
    second = fast(x)
    assert second is not first and counted == runs[1] and second.abs().max() > 0


@pytest.mark.parametrize("example", [torch.ones(2, 4), (torch.ones(2, 4),), {"input": torch.ones(2, 4)}])
def test_examples_are_a_tensor_a_tuple_or_a_dict(example: Any) -> None:
    assert len(plain(linear(), example).entries) == 1


def test_without_an_example_the_first_call_captures() -> None:
    model = linear()
    fast = plain(model)
    assert fast.entries == []
    assert_same(fast, model, torch.randn(2, 4))
    assert len(fast.entries) == 1


def test_a_new_shape_is_recaptured_and_reported() -> None:
    model = linear()
    fast = plain(model, torch.randn(2, 4))
    assert_same(fast, model, torch.randn(5, 4))
    assert_same(fast, model, torch.randn(2, 4))
    assert len(fast.entries) == 2 and events(fast) == ["recapture"]


def test_symbolic_sizes_serve_other_shapes_and_sizes_out_of_range_are_recaptured() -> None:
    model = linear()
    fast = plain(model, torch.randn(2, 4), dynamic=True)
    for rows in (3, 9):
        assert_same(fast, model, torch.randn(rows, 4))
    assert len(fast.entries) == 1
    assert_same(fast, model, torch.randn(1, 4))
    assert len(fast.entries) == 2


def test_conditions_that_export_proved_for_the_example_are_checked() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() if x.shape[0] % 2 == 0 else x.cos()

    model = Halves().eval()
    fast = plain(model, torch.randn(4, 3), dynamic=True)
    for rows in (6, 5, 7):
        assert_same(fast, model, torch.randn(rows, 3))


def test_conditions_are_checked_of_what_was_loaded_too(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() if x.shape[0] % 2 == 0 else x.cos()

    plain(Halves().eval(), torch.randn(4, 3), dynamic=True).save(tmp_path / "halves.regraft")
    loaded = regraft.load(tmp_path / "halves.regraft")
    assert_same(loaded, Halves(), torch.randn(6, 3))
    with pytest.raises(InputError, match="no code for inputs"):
        loaded(torch.randn(5, 3))


def test_a_negated_view_is_not_read_as_the_memory_that_it_looks_at() -> None:
    model, number = linear(), torch.randn(2, 4, dtype=torch.complex64)
    fast = regraft.compile(model, number.imag.clone())
    assert_same(fast, model, number.conj().imag)
    assert events(fast) == ["fallback"]
    with pytest.raises(CaptureError, match=r"resolve_neg\(\)"):
        plain(model, number.conj().imag)


def test_zero_and_minus_zero_are_two_scalars() -> None:
    class Over(nn.Module):
        def forward(self, x: Tensor, by: float) -> Tensor:
            return x / by

    fast, x = plain(Over().eval()), torch.ones(3)
    assert fast(x, 0.0).tolist() == [float("inf")] * 3
    assert fast(x, -0.0).tolist() == [-float("inf")] * 3
    fast(x, float("nan"))
    fast(x, float("nan"))
    assert len(fast.entries) == 3


def test_scalars_are_part_of_the_guard() -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor, exponent: int = 2) -> Tensor:
            return x**exponent

    model, x = Power().eval(), torch.randn(3)
    fast = plain(model, (x, 2))
    assert_same(fast, model, x, 3)
    assert_same(fast, model, x, exponent=3)
    assert_same(fast, model, x)


def test_element_type_and_keyword_order_are_handled() -> None:
    class Difference(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    model, a, b = Difference().eval(), torch.randn(3), torch.randn(3)
    fast = plain(model, {"b": b, "a": a})
    assert_same(fast, model, a=a, b=b)
    assert_same(fast, model, b=b, a=a)
    assert len(fast.entries) == 1
    assert_same(fast, model, a=a.double(), b=b.double())
    assert len(fast.entries) == 2


def test_beyond_the_limit_the_original_runs_until_a_shape_keeps_coming_back() -> None:
    model = linear()
    fast = plain(model, torch.randn(1, 4))
    for rows in range(2, 9):
        fast(torch.randn(rows, 4))
    first = fast.entries[0]
    fast(torch.randn(2, 4))
    assert_same(fast, model, torch.randn(20, 4))
    assert len(fast.entries) == 8 and events(fast)[-1] == "fallback"
    for _ in range(20):
        assert_same(fast, model, torch.randn(20, 4))
    assert len(fast.entries) == 8 and first not in fast.entries


def test_what_cannot_be_captured_at_a_call_runs_as_it_is() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    model = Branch().eval()
    fast = plain(model)
    assert_same(fast, model, torch.ones(2))
    assert_same(fast, model, -torch.ones(2))
    assert events(fast) == ["fallback"]
    with pytest.raises(CaptureError, match="refuses Branch"):
        plain(model, torch.ones(2))


@pytest.mark.parametrize("change", ["in place", "load", "replace", "data"])
def test_changed_weights_are_never_stale(change: str) -> None:
    model, x = linear(), torch.randn(2, 4)
    fast = plain(model, x)
    with torch.no_grad():
        if change == "in place":
            model.weight.mul_(2)
        elif change == "load":
            fast.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.zeros(3)})
        elif change == "replace":
            model.weight = nn.Parameter(torch.ones(3, 4))
        else:
            model.weight.data = torch.ones(3, 4)
    assert_same(fast, model, x)
    assert events(fast) == ["relowering"]


def test_a_changed_constant_is_noticed() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.ones(2)  # neither parameter nor buffer

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table

    model, x = Constant().eval(), torch.zeros(2)
    fast = regraft.compile(model, x)
    model.table.add_(1)
    assert_same(fast, model, x)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


@pytest.mark.parametrize("toolchain", [PLAIN, Toolchain()])
def test_buffers_that_the_model_mutates_are_written_back(toolchain: Toolchain) -> None:
    model, x = Counter().eval(), torch.zeros(2)
    fast = regraft.compile(model, x, toolchain=toolchain)
    assert model.count.item() == 0  # compiling and verifying leave no trace
    assert [fast(x)[0].item() for _ in range(3)] == [1, 2, 3]
    assert model.count.item() == 3
    model.count.zero_()
    assert fast(x)[0].item() == 1 and events(fast) == []


def test_inputs_that_the_model_mutates_are_written_back() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return x * 2

    example = torch.zeros(2)
    fast = plain(Writes().eval(), example)
    assert torch.equal(example, torch.zeros(2))
    x = torch.ones(2)
    assert torch.equal(fast(x), torch.full((2,), 4.0)) and torch.equal(x, torch.full((2,), 2.0))


def test_a_gradient_training_mode_and_autocast_run_the_original() -> None:
    model, x = linear(), torch.randn(2, 4)
    fast = plain(model, x)
    assert fast(x.clone().requires_grad_()).requires_grad and not fast(x).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16
    model.train()
    fast(x)
    assert events(fast) == ["fallback"] * 3 and len(fast.entries) == 1


class Bounded(nn.Module):
    """Adds up positive numbers; a graph has room for two of them."""

    def forward(self, x: Tensor) -> Tensor:
        positive = x > 0
        room = 2 if torch.compiler.is_compiling() else int(positive.sum())
        if torch.compiler.is_compiling():
            torch._assert_async(positive.sum() <= 2, "more than two numbers are positive")
        total: Tensor = x.where(positive, 0.0).sort(descending=True).values[:room].sum()
        return total


def test_what_a_model_asserts_of_its_values_is_kept_and_where_it_fails_the_original_runs(tmp_path: Path) -> None:
    few, many = torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.tensor([1.0, 2.0, 3.0, -1.0])
    fast = regraft.compile(Bounded().eval(), (few,))
    assert fast(few) == 3 and not events(fast)
    assert fast(many) == 6 and fast(few) == 3
    assert any("more than two numbers are positive" in event.reason for event in fast.report.events)
    fast.save(tmp_path / "bounded.regraft")
    loaded = regraft.load(tmp_path / "bounded.regraft")
    assert loaded(few) == 3
    with pytest.raises(InputError, match="more than two numbers are positive"):
        loaded(many)


def test_an_assertion_that_fails_on_the_example_leaves_the_model_as_it_is() -> None:
    many = torch.tensor([1.0, 2.0, 3.0, -1.0])
    fast = regraft.compile(Bounded().eval(), (many,))
    assert fast(many) == 6
    assert any("does not hold on the example" in event.reason for event in fast.report.events)


def test_a_wrong_lowering_is_caught_and_the_original_runs() -> None:
    def wrong(program: Program, session: Session) -> Any:
        run = program.callable()
        return lambda *inputs: [value * 1.01 for value in run(*inputs)]

    model, x = linear(), torch.randn(2, 4)
    fast = regraft.compile(model, x, toolchain=Toolchain(PLAIN.pipeline, wrong))
    assert_same(fast, model, x)
    assert not fast.report.within_tolerance and events(fast) == ["fallback"]
    unchecked = regraft.compile(model, x, verify="off", toolchain=Toolchain(PLAIN.pipeline, wrong))
    assert len(unchecked.entries) == 1


def test_a_model_that_is_another_while_it_is_captured_is_told_apart_from_a_wrong_rewrite() -> None:
    class Chameleon(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (1.0 if torch.compiler.is_compiling() else 2.0)

    fast = regraft.compile(Chameleon().eval(), torch.zeros(3))
    assert torch.equal(fast(torch.zeros(3)), torch.full((3,), 2.0))
    (event,) = fast.report.events
    assert "before any rewrite" in event.reason


def test_a_pass_that_raises_does_not_take_the_model_away() -> None:
    def broken(program: Program, session: Session) -> Any:
        raise RuntimeError("boom")

    model, x = linear(), torch.randn(2, 4)
    fast = regraft.compile(model, x, toolchain=Toolchain(PLAIN.pipeline, broken))
    assert_same(fast, model, x)
    assert "boom" in fast.report.events[0].reason


def test_the_original_can_be_freed() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    expected = model(x).detach()
    fast = regraft.compile(model, x, free_original=True)
    assert sum(p.numel() for p in model.parameters()) == 0
    assert torch.allclose(fast(x), expected, atol=1e-6)
    with pytest.raises(InputError, match=r"float32\[5, 4\].*weights were freed.*float32\[2, 4\]"):
        fast(torch.randn(5, 4))
    with pytest.raises(ArtifactError, match="save before freeing"):
        fast.save("x.regraft")


def test_it_saves_and_loads(tmp_path: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU()).eval(), torch.randn(2, 4)
    fast = regraft.compile(model, x)
    fast.save(tmp_path / "m.regraft")
    again = regraft.load(tmp_path / "m.regraft")
    assert torch.equal(again(x), fast(x))
    with pytest.raises(InputError, match="no original"):
        again(torch.randn(3, 4))


def test_saving_before_anything_is_compiled_is_refused() -> None:
    with pytest.raises(ArtifactError, match="call the model once"):
        plain(linear()).save("x.regraft")


def test_an_exported_program_is_compiled_at_its_own_example_and_for_nothing_else() -> None:
    model, x = linear(), torch.randn(2, 4)
    fast = plain(torch.export.export(model, (x,), strict=False))
    assert_same(fast, model, x)
    with pytest.raises(InputError, match="no code"):
        fast(torch.randn(3, 4))


def test_it_stands_for_the_original() -> None:
    model = linear()
    fast = plain(model, torch.randn(2, 4))
    assert fast.in_features == 4 and fast.original is model
    assert [name for name, _ in fast.named_parameters()] == ["weight", "bias"]
    assert set(fast.state_dict()) == {"weight", "bias"}
    assert_same(nn.Sequential(fast), model, torch.randn(2, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "tpu"}, TargetError, "there is no target 'tpu'; the targets are cpu, cuda"),
        ({"target": "cuda:sm_75"}, TargetError, "there is no target 'cuda:sm_75'"),
        ({"verify": "often"}, OptionError, "verify='often'"),
        ({"budget": 1}, OptionError, "a int was given as the budget"),
        ({"experts": 1}, OptionError, "experts is a int"),
        ({"example_inputs": 3}, CaptureError, "example_inputs is a int"),
    ],
)
def test_options_that_do_not_fit_get_a_sentence(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        regraft.compile(linear(), **options)


def test_a_model_in_training_mode_and_other_things_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"training mode.*model\.eval\(\)"):
        regraft.compile(nn.Linear(2, 2))
    with pytest.raises(CaptureError, match="a function was given"):
        regraft.compile(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="meta device"):
        regraft.compile(nn.Linear(2, 2, device="meta").eval())


def test_a_model_is_compiled_for_its_own_types_whatever_is_cast_around_it() -> None:
    model, x = linear(), torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = regraft.compile(model, (x,))
    assert_same(fast, model, x)
    assert not events(fast)


def test_another_default_element_type_than_at_the_compilation_runs_the_original() -> None:
    class Ramp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linspace(0, 1, 4) + x

    model, x = Ramp().eval(), torch.randn(2, 4)
    fast = regraft.compile(model, (x,))
    torch.set_default_dtype(torch.float64)
    try:
        assert fast(x).dtype == model(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert events(fast) == ["fallback"]


def test_a_model_made_in_inference_mode_is_compiled() -> None:
    with torch.inference_mode():
        model = linear()
    assert_same(regraft.compile(model, (torch.randn(2, 4),)), model, torch.randn(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_is_compiled_under_any_default_element_type(dtype: torch.dtype) -> None:
    model, x = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True).eval(), torch.randn(2, 9, 32)
    torch.set_default_dtype(dtype)
    try:
        fast = regraft.compile(model, (x,))
        assert_same(fast, model, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not events(fast) and fast.report.recognized["attention"] == 1


def test_a_traced_graph_without_modules_has_no_training_mode() -> None:
    model, x = linear(), torch.randn(2, 4)
    with torch.no_grad():
        graph = make_fx(model)(x)
    assert graph.training
    fast = plain(graph, (x,))
    assert_same(fast, model, x)
    assert not events(fast)
