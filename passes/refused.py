"""A site that an analysis refuses."""

from __future__ import annotations

from torch import fx


class Refused(Exception):
    """Why a site cannot be rewritten, and the node that it lies at."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node
