"""Ranks that compile one model together: all come through, or all stop, and none waits for one that has stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from regraft.errors import RegraftError


class PeerError(RegraftError, RuntimeError):
    """Another rank of the process group could not do its part, or was asked for something else."""


class Agreement:
    """The votes of one compilation over the default process group; use it as a context manager.

    A rank that fails inside the block gives its next vote against, so that the others stop with its reason. While the
    model runs no vote is to come: a rank that fails then goes by itself, and torchrun stops the others.
    """

    def __init__(self) -> None:
        self._settled = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model runs on all ranks."""
        self._settled = True
        yield
        self._settled = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not self._settled:
            _gather((str(error), None))

    def facts(self, own: Any) -> list[Any]:
        """What every rank says, by rank. Raises ``PeerError`` where one has failed before."""
        votes = _gather((None, own))
        failed = next((rank for rank, (reason, _) in enumerate(votes) if reason is not None), None)
        if failed is not None:
            self._settled = True  # the one that failed votes no more
            raise PeerError(f"rank {failed} of the process group stopped, and so does this one: {votes[failed][0]}")
        return [fact for _, fact in votes]

    def same(self, what: str, own: Any) -> None:
        """See that all ranks say the same. Raises ``PeerError``."""
        said = self.facts(own)
        other = next((rank for rank, fact in enumerate(said) if fact != said[0]), None)
        if other is not None:
            self._settled = True  # every rank sees this
            raise PeerError(
                f"ranks 0 and {other} of the process group were given different {what} ({said[0]} and {said[other]}); "
                "give every rank the same"
            )


def _gather(vote: tuple[str | None, Any]) -> list[tuple[str | None, Any]]:
    votes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(votes, vote)
    return votes
