"""Bad input through the public API and the command line: one sentence that names what was given, what was expected
and what to do; nothing half-written. What each part refuses by itself is tested beside that part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import regraft
from regraft.cli.main import app
from regraft.errors import ArtifactError, CaptureError, InputError, OptionError, RegraftError, TargetError

X = torch.ones(2, 4)

_MODELS = """
import torch
from torch import nn

def good(): return nn.Linear(4, 3).eval(), torch.ones(2, 4)
def leaving(): raise SystemExit(3)
def rude(): raise BaseException("neither error nor exit")
def without_inputs(): return nn.Linear(4, 3).eval()
def raising(): raise RuntimeError("no weights today\\nand none tomorrow")
def wrong_size(): return nn.Linear(4, 3), torch.ones(2, 5)
def wrong_type(): return nn.Linear(4, 3), torch.ones(2, 4, dtype=torch.int64)

class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x

def branches(): return Branches(), torch.ones(2)

class Drops(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, training=True)

def training(): return Drops(), torch.ones(2)
"""


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, training=True)


@dataclass
class Result:
    values: Tensor


class Wrapped(nn.Module):
    def forward(self, x: Tensor) -> Result:
        return Result(x + 1)


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x * mask


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).eval()


def half_trained() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval()
    model[1].train()
    return model


def said(action: Callable[[], Any], kind: type[RegraftError]) -> str:
    """The one sentence that an action is refused with."""
    with pytest.raises(kind) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence and "Traceback" not in sentence and 20 < len(sentence) < 500
    return sentence


@pytest.mark.parametrize(
    ("model", "example", "parts"),
    [
        (Branches(), torch.ones(2), ("torch.export refuses Branches", "make its forward traceable")),
        (Wrapped(), torch.ones(2), ("refuses Wrapped", "Result", "register_dataclass(Result)", "a tuple or a dict")),
        (Drops(), torch.ones(2), ("dropout", "training mode", "model.eval()")),
        (half_trained(), X, ("dropout", "training mode", "model.eval()")),
        (linear(), torch.ones(2, 5), ("Linear itself fails", "2x5 and 4x3", "give inputs that it accepts")),
        (linear(), X.long(), ("Linear itself fails", "Long and Float", "give inputs that it accepts")),
        (linear(), X.to("meta"), ("Linear itself fails", "device", "give inputs that it accepts")),
        (linear(), (), ("inputs (none) do not fit", "missing a required argument: 'input'", "give the tensors")),
        (linear(), (X, X), ("(input 0, input 1) do not fit", "too many positional arguments", "give the tensors")),
        (linear(), {"y": X}, ("inputs (y) do not fit", "give the tensors")),
        (linear(), (X.numpy(),), ("ndarray", "tensors, numbers, strings", "give such inputs")),
    ],
)
def test_models_and_examples_that_do_not_fit(model: nn.Module, example: Any, parts: tuple[str, ...]) -> None:
    sentence = said(lambda: regraft.compile(model.eval() if model.training else model, example), CaptureError)
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("options", "kind", "parts"),
    [
        ({"target": "abacus"}, TargetError, ("'abacus'", "the targets are cpu")),
        ({"target": "cuda:sm_75"}, TargetError, ("cuda:sm_75", "cpu", "cuda:sm_90")),
        ({"dynamic": "yes"}, OptionError, ("dynamic='yes'", "True")),
        ({"verify": True}, OptionError, ("verify=True", "'each', 'final', 'off'")),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], kind: type[RegraftError], parts: tuple[str, ...]) -> None:
    sentence = said(lambda: regraft.compile(linear(), X, **options), kind)
    for part in parts:
        assert part in sentence


@pytest.fixture
def loaded(tmp_path: Path) -> Any:
    """A model that has no original to fall back on."""
    regraft.compile(Masked().eval(), (X,), kwargs={"mask": X}).save(tmp_path / "m.regraft")
    return regraft.load(tmp_path / "m.regraft")


@pytest.mark.parametrize(
    ("args", "kwargs", "shown"),
    [
        ((X.double(),), {"mask": X}, "float64[2, 4], mask=float32[2, 4]"),
        ((X.to("meta"),), {"mask": X}, "float32[2, 4] on meta, mask=float32[2, 4]"),
        ((X,), {}, "inputs float32[2, 4],"),
        ((X,), {"masks": X}, "masks=float32[2, 4]"),
        ((), {}, "(none)"),
        ((None,), {"mask": X}, "None"),
    ],
)
def test_calls_that_an_artifact_has_no_code_for(
    loaded: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shown: str
) -> None:
    sentence = said(lambda: loaded(*args, **kwargs), InputError)
    assert shown in sentence
    assert "give inputs like those it was compiled for: float32[2, 4], mask=float32[2, 4]" in sentence


def test_another_element_type_or_device_runs_as_the_model_itself_does(caplog: pytest.LogCaptureFixture) -> None:
    """With the original at hand a call gives what the model gives: its result, or its own error."""
    fast = regraft.compile(Masked().eval(), (X,))
    assert fast(X.double()).dtype == torch.float64
    assert fast(X.to("meta")).device.type == "meta"
    strict = regraft.compile(linear(), (X,))
    with pytest.raises(RuntimeError, match="Double and Float"):
        strict(X.double())
    assert "Traceback" not in caplog.text
    assert any("Double and Float" in event.reason for event in strict.report.events)
    assert len(strict.entries) == 1 and strict(X).shape == (2, 3)


def tamper(artifact: Path, out: Path, change: str) -> None:
    """Write a bad copy of an artifact."""
    if change == "truncated":
        out.write_bytes(artifact.read_bytes()[: artifact.stat().st_size * 2 // 3])
        return
    with zipfile.ZipFile(artifact) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if change == "tampered" and info.filename == "weights.safetensors":
                data = data[:-1] + bytes([data[-1] ^ 1])
            target.writestr(info, data)
        if change == "traversal":
            target.writestr("../outside.json", "{}")
        if change == "absurd":
            target.writestr(zipfile.ZipInfo("report.txt"), b"0" * (1 << 22), zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("change", ["truncated", "tampered", "traversal", "absurd"])
def test_bad_artifacts_are_refused_and_write_nothing(change: str, tmp_path: Path) -> None:
    good, bad, folder = tmp_path / "good.regraft", tmp_path / "bad.regraft", tmp_path / "in" / "here"
    folder.mkdir(parents=True)
    regraft.compile(linear(), X).save(good)
    tamper(good, bad, change)
    assert str(bad) in said(lambda: regraft.load(bad), ArtifactError)
    save_file({"0": X}, tmp_path / "x.safetensors")
    out = folder / "y.safetensors"
    result = CliRunner().invoke(app, ["run", str(bad), "--inputs", str(tmp_path / "x.safetensors"), "-o", str(out)])
    assert result.exit_code == 2 or result.exit_code == 1, result.output
    assert result.stderr.startswith("regraft: ") and result.stderr.count("\n") == 1 and result.stdout == ""
    assert list(folder.iterdir()) == [] and not list(tmp_path.rglob("outside.json"))


@pytest.mark.parametrize(
    ("model", "options", "code", "parts"),
    [
        ("good", ["--target", "abacus"], 2, ("'abacus'", "the targets are")),
        ("raising", [], 2, ("bad_models:raising raised", "no weights today", "without arguments")),
        ("leaving", [], 2, ("bad_models:leaving raised SystemExit: 3", "must return a model")),
        ("rude", [], 1, ("unexpected BaseException: neither error nor exit",)),
        ("good", ["--inputs", "out/m.regraft"], 2, ("out/m.regraft is read by the same command", "another output")),
        ("good", ["--html", "out/m.regraft"], 2, ("out/m.regraft is written by the same command", "another output")),
        ("absent", [], 2, ("has no 'absent'",)),
        ("wrong_size", [], 1, ("Linear itself fails", "2x5 and 4x3", "give inputs that it accepts")),
        ("wrong_type", [], 1, ("Linear itself fails", "Long and Float", "give inputs that it accepts")),
        ("branches", [], 1, ("torch.export refuses Branches", "make its forward traceable")),
        ("training", [], 1, ("training mode", "model.eval()")),
        ("without_inputs", [], 1, ("the example inputs (none) do not fit Linear.forward", "give the tensors")),
    ],
)
def test_the_command_line_says_it_once(
    model: str, options: list[str], code: int, parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_models.py").write_text(_MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_models", raising=False)
    monkeypatch.chdir(tmp_path)
    out, page = Path("out/m.regraft"), Path("out/m.html")
    out.parent.mkdir()
    given = ["optimize", f"bad_models:{model}", "-o", str(out), "--html", str(page), *options]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == code, result.output
    assert result.stdout == "" and result.stderr.startswith("regraft: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    "given",
    [
        ["optimize", "nowhere:model", "-o", "m.regraft"],
        ["explain", ":"],
        ["profile", ""],
        ["bisect", "broken.pt2"],
        ["run", "broken.pt2", "--inputs", "x.safetensors", "-o", "y.safetensors"],
    ],
)
def test_every_command_says_it_as_json_too(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.pt2").write_bytes(b"junk")
    save_file({"0": X}, "x.safetensors")
    result = CliRunner().invoke(app, [*given, "--json"])
    said = json.loads(result.stdout)
    assert said == {"error": result.stderr.removeprefix("regraft: ").strip(), "exit_code": 2} and result.exit_code == 2
    assert result.stderr.count("\n") == 1 and capfd.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.pt2", "x.safetensors"]


def test_a_real_process_prints_one_line(tmp_path: Path) -> None:
    """PyTorch's own pages about an export that fails stay away from the terminal."""
    (tmp_path / "bad_models.py").write_text(_MODELS)
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-m", "regraft", "optimize", "bad_models:branches", "-o", "m.regraft"]
    environment = {**os.environ, "PYTHONPATH": root, "REGRAFT_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert not (tmp_path / "m.regraft").exists()
