"""What is wrong with a budget or with what it is measured on."""

from __future__ import annotations

from regraft.ir.errors import RegraftError


class BudgetError(RegraftError, ValueError):
    """A budget that makes no sense, or that nothing can be spent of: the exact model is what remains."""
