"""Building ahead of time, without a GPU."""

from __future__ import annotations

import pytest
import torch

from regraft.codegen.triton.attention_prefill import emit_prefill
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.build import BuildError, build, gpu_target

KERNEL = emit_prefill(AttentionSpec(torch.float16, 64, 64, "band(None,0)", empty_rows="zero"))


def test_a_hopper_binary_uses_its_matrix_unit() -> None:
    made = build(KERNEL, KERNEL.entries[0], "sm_90")
    assert made.binary[:4] == b"\x7fELF" and ".target sm_90a" in made.assembly
    assert made.resources.matrix_instructions["wgmma"] > 0
    assert 0 < made.resources.registers <= 255 and made.resources.shared > 0 and made.resources.spilled == 0


def test_an_amd_binary() -> None:
    made = build(KERNEL, KERNEL.entries[0], "gfx942")
    assert made.extension == "hsaco" and made.resources.matrix_instructions["mfma"] > 0


def test_an_architecture_between_two_takes_the_tiles_of_the_lower() -> None:
    made = build(KERNEL, KERNEL.entries[0], "sm_89")
    assert made.resources.config == KERNEL.entries[0].configs["sm_80"] and ".target sm_89" in made.assembly
    assert made.resources.shared <= 99 << 10  # what a program of sm_86 and sm_89 has


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(BuildError, match="no tiles for 'sm_70'"):
        build(KERNEL, KERNEL.entries[0], "sm_70")
    with pytest.raises(ValueError, match="the architecture is 'h100'"):
        gpu_target("h100")
