"""What runs an attention: decided by measurement on a device, kept as records, and never measured twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from regraft.codegen.triton import attention_candidates, tuner
from regraft.codegen.triton.attention_candidates import Candidate
from regraft.codegen.triton.attention_site import Site, sites_of
from regraft.codegen.triton.lower import KernelExecutable, lower
from regraft.codegen.triton.tuner import KernelTuner
from regraft.codegen.triton.tuning_records import TuningRecord, from_lines
from regraft.codegen.triton.workbench import Workbench
from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.ir.records import Log
from regraft.ir.verify import relative_l2
from regraft.passes.pipeline import default_pipeline
from tests.codegen.triton.benches import bench
from tests.codegen.triton.test_lower import Block
from tests.codegen.triton.test_lower import Site as OneSite
from tests.support import captured

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")  # it is the definition here


def program_of(model: nn.Module, args: tuple[Any, ...], dynamic: Any = None) -> Program:
    program = captured(model, args, dynamic)
    default_pipeline("cuda").run(program, Session(verify="off"))
    return program


def site(length: int = 24, batch: int = 2, mask_tensors: tuple[Tensor, ...] = (), **options: Any) -> Any:
    make = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(batch, heads, length, 16, generator=make) for heads in (4, 2, 2)) + mask_tensors
    model = OneSite(**options)
    return program_of(model, inputs), model, inputs


def decided(program: Program, times: dict[str, float], arch: str = "sm_90") -> tuple[KernelExecutable, KernelTuner]:
    measuring = KernelTuner(bench=bench(times, arch))
    return lower(program, Log(), measuring), measuring


@pytest.mark.parametrize("choice", ["kernel", "flash", "math", "flex"])
def test_the_fastest_runs_and_gives_the_outputs(choice: str) -> None:
    program, model, inputs = site(mask="band(-5,0)", empty_rows="zero")
    executable, _ = decided(program, {choice: 0.5})
    (made,) = executable.choices
    assert made.runs == choice and made.record is not None and made.record.seconds[choice] == 0.5
    assert relative_l2(executable(*inputs)[0], model(*inputs)) < 1e-6
    assert bool(executable.kernels) == (choice == "kernel")


def test_every_candidate_that_can_run_is_timed_and_the_others_say_why_not() -> None:
    program, _, _ = site(mask="band(-5,0)", empty_rows="zero")
    _, measuring = decided(program, {})
    (record,) = measuring.records.values()
    assert {"kernel", "flash", "math", "flex"} <= set(record.seconds) and len(record.seconds) == 7
    assert set(record.left_out) == {"cudnn", "efficient"}  # a CPU has neither
    assert record.device == "a sm_90 of a test" and record.config is None
    causal, _, _ = site(mask="band(None,0)", empty_rows="zero")
    (record,) = decided(causal, {})[1].records.values()
    assert record.left_out["flex"] == "PyTorch's attention takes this mask as a flag"  # not worth its compilation


def test_the_report_says_what_was_faster_than_the_kernel() -> None:
    program, _, _ = site()
    log = Log()
    lower(program, log, KernelTuner(bench=bench({"flash": 0.25})))
    (refusal,) = log.refusals
    assert refusal.reason == (
        "no kernel: on a sm_90 of a test it took 1e+03 ms, and PyTorch's attention (flash) 250 ms; "
        "PyTorch's attention (flash) runs"
    )


def test_tiles_that_won_stand_in_the_text_of_the_kernel_for_their_architecture_alone() -> None:
    program, _, _ = site()
    plain = lower(program).kernels[0]
    tiles = plain.entries[0].configs["sm_90"]
    smaller = (tiles[0], tiles[1] // 2, tiles[2], tiles[3] + 1)
    executable, measuring = decided(program, {f"kernel {' '.join(map(str, smaller))}": 0.5})
    (kernel,) = executable.kernels
    assert kernel.entries[0].configs == {**plain.entries[0].configs, "sm_90": smaller}
    assert f'"sm_90": {smaller}' in kernel.source and kernel.name != plain.name
    (record,) = measuring.records.values()
    assert record.config == smaller and record.key.kernel == plain.name


def test_a_candidate_whose_output_is_wrong_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    program, model, inputs = site()
    wrong = Candidate("math", lambda context, given: context.call(_wrong, *map(context.value, _three(given))))
    listed = attention_candidates.candidates
    monkeypatch.setattr("regraft.codegen.triton.attention_trial.candidates", lambda *a: [*listed(*a), wrong])
    executable, measuring = decided(program, {"math": 1e-3, "flash": 0.5})
    (record,) = measuring.records.values()
    assert record.choice == "flash" and "away from the definition's" in record.left_out["math"]
    assert relative_l2(executable(*inputs)[0], model(*inputs)) < 1e-6


def _three(given: dict[str, Any]) -> list[Any]:
    return [given[name] for name in ("query", "key", "value")]


def _wrong(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value.repeat_interleave(query.shape[1] // key.shape[1], 1)


def test_nothing_can_run_but_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    program, model, inputs = site()
    monkeypatch.setattr("regraft.codegen.triton.attention_trial.candidates", lambda *a: [])
    executable, _ = decided(program, {})
    assert executable.choices[0].runs == "definition"
    assert relative_l2(executable(*inputs)[0], model(*inputs)) < 1e-6


class Measured:
    """Counts what is measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sites: list[Site] = []
        measure = tuner.measured

        def counted(site: Site, program: Program, bench: Workbench) -> Any:
            self.sites.append(site)
            return measure(site, program, bench)

        monkeypatch.setattr(tuner, "measured", counted)


def test_sites_that_are_alike_are_measured_once_and_records_are_not_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = Measured(monkeypatch)
    program = program_of(nn.Sequential(Block(), Block()).eval(), (torch.randn(2, 7, 16),))
    executable, measuring = decided(program, {"flash": 0.5})
    assert len(executable.choices) == 4 and len(count.sites) == 2
    lines = measuring.to_lines()
    assert executable.tuning == lines and KernelTuner(from_lines(lines)).to_lines() == lines
    again = lower(program, tuner=KernelTuner(from_lines(lines), bench({})))
    assert len(count.sites) == 2 and [choice.runs for choice in again.choices] == ["flash"] * 4


def test_a_length_of_the_same_bucket_is_known_and_another_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    count = Measured(monkeypatch)
    measuring = KernelTuner(bench=bench({}))
    for length, known in ((20, 1), (30, 1), (40, 2)):
        lower(site(length)[0], tuner=measuring)
        assert len(count.sites) == known


def test_records_of_another_architecture_are_not_used_and_that_is_told() -> None:
    program, _, _ = site()
    _, measuring = decided(program, {"flash": 0.5}, "sm_80")
    executable = lower(program, tuner=KernelTuner(from_lines(measuring.to_lines()), arch="sm_90"))
    assert executable.choices[0].runs == "kernel"
    assert executable.notes == (
        "tuning records are for sm_80, and the architecture is sm_90: they are not used, and 1 attentions run what is "
        "chosen by default",
    )
    both = from_lines(measuring.to_lines()) + from_lines(decided(program, {"math": 0.5})[1].to_lines())
    assert lower(program, tuner=KernelTuner(both, arch="sm_90")).choices[0].runs == "math"


def test_without_a_device_the_default_runs_and_that_is_told() -> None:
    program, _, _ = site()
    executable = lower(program, tuner=KernelTuner.of(program, "cuda:sm_90"))
    assert executable.choices[0].runs == "kernel" and executable.tuning == b""
    assert executable.notes == (
        "no GPU of the target is at hand: 1 attentions run what is chosen by default, and were not measured",
    )


def test_a_device_that_cannot_hold_the_sample_leaves_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(tuner, "measured", fails)
    executable, measuring = decided(site()[0], {})
    assert executable.choices[0].runs == "kernel" and not measuring.records
    assert executable.notes == (
        "measuring on a sm_90 of a test failed (OutOfMemoryError: CUDA out of memory): 1 attentions run what "
        "is chosen by default, and were not measured",
    )


def test_a_choice_that_a_site_cannot_run_is_not_taken() -> None:
    program, _, _ = site(softcap=2.0)
    (found,) = sites_of(program.graph)
    held = KernelTuner([TuningRecord(found.key, "sm_90", "flash", None)], arch="sm_90")
    assert lower(program, tuner=held).choices[0].runs == "kernel"  # flash has no softcap


@pytest.mark.parametrize(
    ("options", "tensors"),
    [
        ({"mask": "keys(0) & band(None,0)", "empty_rows": "zero"}, (torch.ones(2, 24, dtype=torch.bool),)),
        ({"mask": "lengths(0)", "mask_fill": -1e9}, (torch.tensor([24, 9]),)),
        ({"mask": "same(0,0)"}, (torch.arange(24).expand(2, 24) // 7,)),
        ({"mask": "dense(0)"}, (torch.rand(2, 1, 24, 24) > 0.2,)),
        ({"mask": "bits(0)"}, (torch.arange(1, 49).reshape(2, 24, 1),)),
        ({"mask": "band(-3,0) | heads(0,2)", "bias": torch.randn(4, 24, 24)}, ()),
        ({"bias": torch.randn(1, 1, 1, 24), "slopes": torch.rand(4), "sinks": torch.rand(4), "softcap": 3.0}, ()),
        ({"mask": "band(None,0)", "weight": "sigmoid", "normaliser": "none"}, ()),
    ],
)
def test_candidates_of_every_kind_of_site_agree_with_its_definition(
    options: dict[str, Any], tensors: tuple[Tensor, ...]
) -> None:
    program, model, inputs = site(mask_tensors=tensors, **options)
    executable, measuring = decided(program, {})
    (record,) = measuring.records.values()
    assert "kernel" in record.seconds and not set(record.left_out) - {"cudnn", "efficient", "flex"}, record.left_out
    torch.testing.assert_close(executable(*inputs)[0], model(*inputs), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_decoding_site_is_measured_as_one() -> None:
    make = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(2, heads, length, 16, generator=make) for heads, length in ((4, 1), (2, 40), (2, 40)))
    program = program_of(OneSite(), inputs)
    executable, measuring = decided(program, {})
    (record,) = measuring.records.values()
    assert record.key.bucket == (2, 4, 2, 1, 64) and executable.choices[0].kernel.startswith("attention_decode")


def test_sites_of_symbolic_sizes_are_measured_at_those_of_the_example() -> None:
    model, x = Block().eval(), torch.randn(2, 9, 16)
    program = program_of(model, (x,), {"x": {1: Dim("length", min=2, max=64)}})
    executable, measuring = decided(program, {"flash": 0.5})
    assert {record.key.bucket[3] for record in measuring.records.values()} == {16}
    for length in (2, 9, 33):
        x = torch.randn(2, length, 16)
        assert relative_l2(executable(x)[0], model(x)) < 1e-5


def test_a_site_without_a_kernel_chooses_among_the_rest() -> None:
    make = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(2, 2, 12, 16, generator=make, dtype=torch.float64) for _ in range(3))
    program = program_of(OneSite(mask="band(None,0)"), inputs)
    executable, measuring = decided(program, {"math": 0.5})
    (record,) = measuring.records.values()
    assert executable.choices[0].runs == "math" and "kernel" not in record.seconds
    assert "elements are torch.float64" in executable.choices[0].reason
