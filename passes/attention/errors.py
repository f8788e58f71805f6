"""What is wrong with a lossy pass over attention that was asked for."""

from __future__ import annotations

from regraft.ir.errors import RegraftError


class AttentionError(RegraftError, ValueError):
    """A site, a head or a layer that the program does not have, or a knob that makes no sense."""
