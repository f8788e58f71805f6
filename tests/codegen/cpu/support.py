"""What tests of the lowering to the CPU share: they run without native kernels too, where there is no compiler."""

from __future__ import annotations

import pytest

from regraft.codegen.cpu.linear_kernels import KERNELS
from regraft.codegen.cpu.native.kernels import NATIVE

needs_native = pytest.mark.skipif(bool(NATIVE.missing()), reason=NATIVE.missing())
#: Every kernel of linear layers, as parameters of a test.
LINEAR_KERNELS = [pytest.param(name, marks=needs_native if name == "native" else (), id=name) for name in KERNELS]
