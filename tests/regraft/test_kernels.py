"""Models compiled for a GPU on a machine without one: kernels in the artifact, checked when it is loaded."""

from __future__ import annotations

import copy
import json
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft.build import Toolchain
from regraft.codegen.triton.lower import lower
from regraft.codegen.triton.tuner import KernelTuner
from regraft.errors import ArtifactError, OptionError
from regraft.ir.driver import Session
from regraft.ir.program import Program
from tests.codegen.triton.benches import bench

X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.packed, self.out = nn.Linear(16, 48, dtype=dtype), nn.Linear(16, 16, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.packed(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.regraft"
    regraft.compile(Attention().eval(), X, target="cuda:sm_90").save(path)
    return path


def test_a_model_is_lowered_for_a_gpu_and_runs_here() -> None:
    model = Attention().eval()
    fast = regraft.compile(model, X, target="cuda:sm_90")
    torch.testing.assert_close(fast(X), model(X), rtol=1e-5, atol=1e-5)
    report = fast.report
    assert report.target == "cuda:sm_90" and report.statistics["attention-kernel"].fired == 1
    assert [event.reason for event in report.events if "as its definition" in event.reason]
    assert report.environment.device and regraft.compile(model, X, target="cuda").report.summary()


def test_what_has_no_kernel_stands_in_the_report() -> None:
    fast = regraft.compile(Attention(torch.float64).eval(), X.double(), target="cuda")
    (refusal,) = [refusal for refusal in fast.report.refusals if refusal.rule == "attention-kernel"]
    assert "torch.float64" in refusal.reason and "PyTorch's attention runs" in refusal.reason
    assert "attention-kernel" in fast.report.summary()


def test_an_artifact_holds_the_texts_of_its_kernels(tmp_path: Path) -> None:
    path, model = saved(tmp_path), Attention().eval()
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.startswith("kernels/")]
        text, manifest = archive.read(name), json.loads(archive.read("manifest.json"))
    assert name.endswith("/source.py") and b"triton.jit" in text and manifest["targets"] == ["cuda:sm_90"]
    assert manifest["members"][name]["sha256"] == sha256(text).hexdigest()
    loaded = regraft.load(path)
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-5, atol=1e-5)
    assert not [event for event in loaded.report.events if event.kind == "relowering"]


def rewritten(path: Path, change: dict[str, str | None]) -> Path:
    """The artifact with members renamed, or with a line behind their text, all hashes being right."""
    out = path.with_name("changed.regraft")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        manifest = json.loads(source.read("manifest.json"))
        for info in source.infolist():
            data, name = source.read(info), info.filename
            kind = next((kind for kind in change if name.startswith(kind)), None)
            if name == "manifest.json":
                continue
            if kind is not None:
                entry = manifest["members"].pop(name)
                name = change[kind] or name
                data += b"# changed\n" * (change[kind] is None)
                manifest["members"][name] = {**entry, "size": len(data), "sha256": sha256(data).hexdigest()}
            target.writestr(zipfile.ZipInfo(name), data)
        target.writestr(zipfile.ZipInfo("manifest.json"), json.dumps(manifest))
    return out


def test_a_text_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path), {"kernels/": None})
    with pytest.raises(ArtifactError, match=r"changed.regraft cannot be loaded: its member kernels/.* is not the text"):
        regraft.load(path)


def test_texts_of_another_version_are_not_run(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path), {"kernels/": "kernels/attention_prefill_0123/source.py"})
    loaded = regraft.load(path)
    torch.testing.assert_close(loaded(X), Attention().eval()(X), rtol=1e-5, atol=1e-5)
    assert [event.reason for event in loaded.report.events if event.kind == "relowering"] == [
        "1 of 1 saved kernels were emitted by another version of regraft, or chosen on another architecture; "
        "what this version chooses here runs instead"
    ]


def measured(tmp_path: Path, arch: str, choice: str) -> Path:
    """An artifact that was compiled beside a device of a test, on which ``choice`` was the fastest."""

    def lowering(program: Program, session: Session) -> Any:
        return lower(program, session.log, KernelTuner(bench=bench({choice: 0.5}, arch)))

    path = tmp_path / "measured.regraft"
    toolchain = Toolchain(lower=lowering)
    regraft.compile(Attention().eval(), X, target=f"cuda:{arch}", toolchain=toolchain).save(path)
    return path


@pytest.mark.parametrize("choice", ["flash", "kernel 64 32 8 3"])
def test_loading_takes_what_was_measured_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    path = measured(tmp_path, "sm_90", choice)
    monkeypatch.setattr("regraft.codegen.triton.tuner.measured", None)
    loaded = regraft.load(path)
    (made,) = loaded.entries[0].executable.choices
    assert made.runs == choice.partition(" ")[0]
    assert [kernel.entries[0].configs["sm_90"] for kernel in loaded.entries[0].executable.kernels] == (
        [] if choice == "flash" else [(64, 32, 8, 3)]
    )
    assert not [event for event in loaded.report.events if event.kind in ("relowering", "tuning")]
    torch.testing.assert_close(loaded(X), Attention().eval()(X), rtol=1e-5, atol=1e-5)
    loaded.save(tmp_path / "again.regraft")
    with zipfile.ZipFile(path) as first, zipfile.ZipFile(tmp_path / "again.regraft") as second:
        assert first.read("tuning.jsonl") == second.read("tuning.jsonl")
    assert copy.deepcopy(loaded).entries[0].executable.choices[0].runs == made.runs


def test_records_of_another_architecture_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = measured(tmp_path, "sm_80", "flash")
    monkeypatch.setattr("regraft.codegen.triton.tuner._arch_of", lambda program: "sm_90")
    loaded = regraft.load(path)
    assert loaded.entries[0].executable.choices[0].runs == "kernel"
    (told,) = (event.reason for event in loaded.report.events if event.kind == "tuning")
    assert "tuning records are for sm_80, and the architecture is sm_90" in told


def test_a_record_that_regraft_would_not_write_is_refused(tmp_path: Path) -> None:
    path = rewritten(measured(tmp_path, "sm_90", "flash"), {"tuning.jsonl": None})
    with pytest.raises(ArtifactError, match=r"changed.regraft cannot be loaded: its tuning.jsonl is not JSON lines"):
        regraft.load(path)


def test_a_budget_is_for_the_cpu() -> None:
    with pytest.raises(OptionError, match="a budget was given for the target 'cuda'"):
        regraft.compile(Attention().eval(), X, target="cuda", budget=regraft.Budget("kl", 0.01), calibration=[X, X])
