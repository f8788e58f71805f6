"""What is wrong with a placement of experts."""

from __future__ import annotations

from regraft.ir.errors import RegraftError


class PermutationError(RegraftError, ValueError):
    """A plan that is no permutation of a model's experts, or one that the model's router does not allow."""


class ShardingError(RegraftError, ValueError):
    """A plan that cannot be run by ranks as it was asked for, or one that is not for this model."""
