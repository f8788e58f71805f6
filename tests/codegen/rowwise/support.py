"""How near to fp64 the results of a region must be, whichever back end made them."""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest relative L2 error against fp64.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def agree(result: Tensor, exact: Tensor, usual: Tensor) -> None:
    """Assert that a result is as near to fp64 as its type allows, or as near as PyTorch's own."""
    if not result.dtype.is_floating_point:
        assert torch.equal(result, usual)
        return
    finite = torch.isfinite(exact) & torch.isfinite(usual)
    torch.testing.assert_close(result.double()[~finite], usual.double()[~finite], equal_nan=True)
    error, own = (distance(x[finite], exact[finite]) for x in (result, usual))
    assert error <= max(TOLERANCE[result.dtype], 2 * own), (error, own)


def distance(result: Tensor, exact: Tensor) -> float:
    """Relative L2 distance."""
    return float((result.double() - exact).norm() / exact.norm().clamp(min=1e-30))
