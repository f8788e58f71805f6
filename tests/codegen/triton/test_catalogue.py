"""The catalogue lists kernels that can be built: emitted, loaded, with a configuration for every architecture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from regraft.codegen.triton.attention_configs import ARCHS
from regraft.codegen.triton.catalogue import FAMILIES, samples
from regraft.codegen.triton.load import load_kernel


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_can_be_built(family: str) -> None:
    listed = list(samples(family))
    kernels = [sample.emit() for sample in listed]
    assert len({kernel.digest for kernel in kernels}) == len({sample.name for sample in listed}) == len(listed)
    for kernel in kernels:
        module = load_kernel(kernel)
        for entry in kernel.entries:
            names = [parameter.name for parameter in entry.parameters]
            assert list(getattr(module, entry.name).arg_names[: len(names)]) == names
            assert set(ARCHS) <= set(entry.configs)
            assert {len(config) for config in entry.configs.values()} == {len(entry.sizes) + 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_as_ruff_formats_them(family: str, tmp_path: Path) -> None:
    for place, sample in enumerate(samples(family)):
        (tmp_path / f"kernel_{place}.py").write_text(sample.emit().source, encoding="utf-8")
    rules = ["--config", str(Path(__file__).parents[3] / "pyproject.toml")]
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *rules, str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_a_family_that_is_not_there_is_refused() -> None:
    with pytest.raises(KeyError, match="convolution"):
        list(samples("convolution"))
