"""``make gpu`` rehearsed on a CPU: rows are kept, taken up again, and judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    aot,
    gpu,
    gpu_attention,
    gpu_decode,
    gpu_models,
    gpu_moe,
    gpu_norms,
    gpu_targets,
    gpu_tests,
    gpu_tokens,
)
from bench.gpu_operands import Sizes, attention_operands
from bench.gpu_rows import Outcome, Part, Setting, measure_row, offered, run_part
from regraft.codegen.triton.attention_samples import MASKS
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.build import Build, BuildError, Resources
from regraft.codegen.triton.catalogue import Sample
from regraft.codegen.triton.emit import Entry, Kernel

TINY = Setting("cpu", tiny=True)


def part_of(**outcomes: Any) -> tuple[Part, list[str]]:
    """A part whose rows give what is named, and the rows that were measured."""
    measured: list[str] = []

    def row(label: str) -> Any:
        def run(setting: Setting) -> Outcome:
            measured.append(label)
            if isinstance(outcomes[label], BaseException):
                raise outcomes[label]
            return Outcome({"figure": 1.0}, outcomes[label])

        return run

    return Part("attention", 1.0, lambda setting: {label: row(label) for label in outcomes}), measured


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "gpu_attention.json"
    part, measured = part_of(good=True, told=None, bad=False)
    record = run_part(part, TINY, path)
    assert record["complete"] and json.loads(path.read_text())["rows"] == record["rows"]
    run_part(part, TINY, path)
    assert measured == ["good", "told", "bad", "bad"]  # only what failed
    more, later = part_of(bad=False, new=True, good=True, told=None)
    run_part(more, TINY, path)
    assert later == ["new", "bad"]  # and that behind what is missing
    run_part(part, TINY, path, again=True)
    assert measured[4:] == ["good", "told", "bad"]


def test_rows_of_another_setting_do_not_count(tmp_path: Path) -> None:
    part, measured = part_of(good=True)
    run_part(part, TINY, tmp_path / "r.json")
    run_part(part, Setting("cpu"), tmp_path / "r.json")
    assert measured == ["good", "good"]


def test_a_row_that_raises_fails_alone(tmp_path: Path) -> None:
    part, _ = part_of(broken=ValueError("no such tile\nand more"), good=True)
    record = run_part(part, TINY, tmp_path / "r.json")
    assert record["rows"]["broken"]["figures"] == {"error": "ValueError: no such tile"} and not record["missing"]
    assert gpu.verdict([record]) == 1 and gpu.verdict([None]) == 1
    assert gpu.verdict([run_part(part_of(good=True)[0], TINY, tmp_path / "s.json")]) == 0
    assert gpu.show([record, None]).row_count == 2


def test_a_part_that_was_cut_off_says_what_is_missing(tmp_path: Path) -> None:
    part, measured = part_of(good=True, late=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_part(part, TINY, tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["missing"] == ["late"] and not record["complete"] and gpu.verdict([record]) == 1
    assert gpu.show([record]).row_count == 2
    run_part(part_of(good=True, late=True)[0], TINY, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["complete"] and measured == ["good", "late"]


def test_a_peer_that_is_not_installed_is_told_in_the_row() -> None:
    def absent() -> Any:
        import no_such_library  # type: ignore[import-not-found]

        return no_such_library.function

    def row(setting: Setting) -> Outcome:
        return Outcome({"peers": len(offered({"absent": absent, "there": lambda: lambda: 1}))})

    made = measure_row(Part("norms", 1.0, lambda setting: {"row": row}), "row", TINY)
    assert made["figures"] == {"peers": 1}
    assert made["left_out"] == {"absent": "ModuleNotFoundError: No module named 'no_such_library'"}


def test_every_target_gets_a_verdict() -> None:
    def record(part: str, missing: tuple[str, ...] = (), **rows: Any) -> dict[str, Any]:
        made = {label: {"met": met, "figures": {"error": "E"} if met is None else {}} for label, met in rows.items()}
        made = {label: {**row, "met": row["met"] or {}} for label, row in made.items()}
        return {"part": part, "rows": made, "missing": list(missing)}

    found = gpu_targets.verdicts(
        [
            record(
                "attention", a={"masked": True, "flex": False}, b={"masked": True, "flex": True}, c={"lengths": True}
            ),
            record("norms", ("late",), a={"norms": True}),
            record("moe", a={"experts, few tokens": True}, b=None),
            None,
        ]
    )
    words = {verdict.name: (verdict.word, verdict.missed, verdict.missing) for verdict in found}
    assert words["masked"] == ("met", (), ()) and words["flex"] == ("not met", ("a",), ())
    assert words["lengths"] == ("met", (), ()) and words["prefill 64"] == ("not measured", (), ())
    assert words["norms"] == ("met so far", (), ("late",))
    assert words["experts, few tokens"] == ("met so far", (), ("b",))
    assert words["experts, many tokens"] == ("not measured", (), ("b",))
    assert "decode" not in words and gpu_targets.show(found).row_count == len(found)


def test_targets_are_of_parts_and_the_parts_fit_into_the_time() -> None:
    assert {target.part for target in gpu_targets.TARGETS.values()} == set(gpu.PARTS)
    assert sum(part.seconds for part in gpu.PARTS.values()) <= 60 * gpu.MINUTES


@pytest.mark.parametrize(
    ("part", "label"),
    [
        (gpu_tests.TESTS, "prefill bfloat16 128 documents"),
        (gpu_tests.TESTS, "decode bfloat16 128 pages of 16"),
        (gpu_tests.TESTS, "merge float32 64"),
        (gpu_tests.TESTS, "columns bfloat16 128 everything"),
        (gpu_tests.TESTS, "topk bfloat16 128 64"),
        (gpu_tests.TESTS, "merge, logs, layer norm bfloat16 768"),
        (gpu_tests.TESTS, "unmerge float16 768"),
        (gpu_tests.TESTS, "program: choice of padding attention"),
        (gpu_tests.TESTS, "program: an artifact from a CPU"),
        (gpu_tests.TESTS, "program: a CUDA graph"),
        *((gpu_models.MODELS_PART, name) for name in gpu_models.MODELS),
    ],
)
def test_numbers_agree(part: Part, label: str) -> None:
    row = measure_row(part, label, TINY)
    assert row["passed"] is True and 0 <= row["figures"]["error"] < 0.02


@pytest.mark.parametrize("label", ["plan bipartite, mean of heads bfloat16 64", "plan fuse float32 64"])
def test_plans_agree(label: str) -> None:
    row = measure_row(gpu_tests.TESTS, label, TINY)
    assert row["passed"] is True and row["figures"] == {"tokens that go to the same": 1.0, "the same again": True}


def test_every_kernel_of_the_catalogue_has_a_row() -> None:
    listed = [sample.name for family in ("attention", "tokens") for sample in aot.samples(family)]
    assert set(listed) <= set(gpu_tests.TESTS.rows(TINY))


@pytest.mark.parametrize("label", gpu_norms.NORMS.rows(TINY))
def test_the_rows_of_norms_run(label: str) -> None:
    row = measure_row(gpu_norms.NORMS, label, TINY)
    assert row["passed"] is None and row["figures"]["share of the bandwidth of a copy"] > 0
    assert row["figures"]["error"] < 0.01


@pytest.mark.parametrize("label", gpu_moe.MOE.rows(TINY))
def test_the_rows_of_experts_run(label: str) -> None:
    row = measure_row(gpu_moe.MOE, label, TINY)
    assert row["passed"] is None and row["figures"]["error"] < 0.01 and row["figures"]["TFLOP/s"] > 0


def test_a_row_of_tokens_runs() -> None:
    row = measure_row(gpu_tokens.TOKENS, "vit-b16 x8, r=8", TINY)
    assert (
        row["passed"] is None and row["figures"]["token kernels"] == 2 and row["figures"]["error of the exact"] < 0.03
    )


def test_what_fewer_tokens_save() -> None:
    """The ratios of multiplications that are known of these models at r = 8."""
    base, large = (gpu_tokens.saved(size, 197, 8) for size in gpu_tokens._SIZES.values())
    assert abs(base - 1.34) < 0.02 and abs(large - 1.99) < 0.05
    assert gpu_tokens.saved(gpu_tokens._SIZES["vit-b16"], 197, 0) == 1.0


@pytest.mark.parametrize("label", ["dense 64", "half of the heads local 128", "documents 128", "ten lengths"])
def test_the_rows_of_attention_run(label: str) -> None:
    row = measure_row(gpu_attention.ATTENTION, label, TINY)
    assert "error" not in row["figures"] and row["passed"] in (None, True)


@pytest.mark.parametrize("label", gpu_decode.DECODE.rows(TINY))
def test_the_rows_of_decoding_run(label: str) -> None:
    row = measure_row(gpu_decode.DECODE, label, TINY)
    assert row["figures"]["share of the bandwidth of a copy"] > 0 and row["passed"] is None


@pytest.mark.parametrize("name", [name for name in MASKS if name != "dense"])
def test_flex_gets_the_same_mask(name: str) -> None:
    """The rule of a peer says what the predicate says, for the tensors that both read."""
    spec, sizes = AttentionSpec(torch.bfloat16, 16, 16, MASKS[name]), Sizes(2, 12, 1, 700, 700)
    given = attention_operands(spec, sizes, "cpu")
    seen = gpu_attention._seen(spec, sizes, given)
    batch, head, row, key = (torch.arange(size) for size in (2, seen.shape[1], 700, 700))
    index = batch[:, None, None, None], head[:, None, None], row[:, None], key
    rule = gpu_attention._flex_rules(given)[MASKS[name]](*index)
    assert torch.equal(torch.as_tensor(rule).expand(seen.shape), seen)


def test_live_tiles_are_those_with_a_visible_pair() -> None:
    seen = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
    assert gpu_attention._live_share(seen, 16, 16) == 10 / 16
    assert gpu_attention._live_share(seen[..., :60], 64, 32) == 1.0


def test_a_build_that_spills_or_misses_the_matrix_unit_fails() -> None:
    entry = Entry("attention_prefill_1", (), (), {"sm_90": (64, 64, 4, 2)})
    kernel = Kernel("attention_prefill_1", "", (entry,), ())
    sample = Sample("attention", "prefill bfloat16 64", lambda: kernel)

    def judged(spilled: int, units: dict[str, int], arch: str = "sm_90") -> str | None:
        made = Build("e", b"", "cubin", "", "ptx", Resources(arch, (64, 64, 4, 2), 128, 1024, spilled, units))
        return aot.row_of(sample, kernel, entry, arch, made).failure

    assert judged(0, {"wgmma": 4}) is None and judged(0, {}, "sm_80") is None
    assert judged(8, {"wgmma": 4}) == "spills 8 bytes a thread"
    assert judged(0, {"mma": 4}) == "does not use wgmma"
    assert aot.row_of(sample, kernel, entry, "sm_90", BuildError("refused")).failure == "refused"
