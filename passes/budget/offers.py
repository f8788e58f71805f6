"""Who offers lossy rewrites to the budget, beside token reduction, whose schedules have a solver of their own."""

from __future__ import annotations

from regraft.passes.attention.offers import (
    offer_decode_sparsity,
    offer_dormant_heads,
    offer_specialised_heads,
    offer_windows,
)
from regraft.passes.budget.candidate import Offer
from regraft.passes.budget.precision import offer_precision

#: Asked in this order. A pass that can lose accuracy joins by a function like these; see ``candidate.py``.
OFFERS: tuple[Offer, ...] = (
    offer_windows,
    offer_specialised_heads,
    offer_dormant_heads,
    offer_decode_sparsity,
    offer_precision,
)
