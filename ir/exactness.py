"""What a rewrite promises about numbers."""

from __future__ import annotations

from enum import Enum

import torch


class Exactness(Enum):
    """Declared by every rule, checked by the driver on probe inputs.

    ``BITWISE``: the same bits. ``REASSOCIATED``: only the order of floating-point operations changes, and fp32
    accumulation is kept wherever the source had it. ``LOSSY``: the result changes; the rule has a knob and runs only
    under an accuracy budget.
    """

    BITWISE = "bitwise"
    REASSOCIATED = "reassociated"
    LOSSY = "lossy"


#: Largest relative L2 error of one REASSOCIATED rewrite against what it replaces, by element type. A rewrite above
#: it is still accepted when it is as close to an fp64 reference as the original is (see ``ir/verify.py``).
REASSOCIATION_TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
