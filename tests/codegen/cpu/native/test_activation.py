"""Activations behind a native linear layer, where numbers are large, infinite or none at all."""

from __future__ import annotations

import math

import pytest
import torch

from regraft.codegen.cpu.native.kernels import NATIVE
from regraft.codegen.cpu.native.linear import ACTIVATIONS, linear, pack
from regraft.ir.ops.activation import activate
from tests.codegen.cpu.support import needs_native

pytestmark = needs_native


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers_at_the_ends_go_where_the_formula_does(activation: str) -> None:
    library = NATIVE.library()
    x = torch.tensor([[math.nan], [-1e4], [-40.0], [0.0], [1e4], [math.inf]])
    packed = pack(library, torch.ones(3, 1))
    result = linear(library, x, packed, 3, None, activation, None, None).run(library)
    expected = activate(x.double(), activation).expand(-1, 3)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-12, equal_nan=True)
