"""Where independent work runs: in this process, in a pool of local ones, or on a Dask cluster."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from regraft.errors import OptionError, RegraftError

_MOST_PROCESSES = 512
_SECONDS_TO_CONNECT = "10s"


class ExecutorError(RegraftError, RuntimeError):
    """Work that was handed over came to no end: a process died or a connection was lost."""


@contextmanager
def executor_of(text: str | None) -> Iterator[Executor | None]:
    """The executor that ``text`` names, shut down at the end: None or "none", a number of processes, or the address
    of a Dask scheduler (tcp://host:port). Raises ``OptionError`` for anything else and where Dask is not installed or
    does not answer, ``ExecutorError`` where it breaks down later.
    """
    if text is None or text == "none":
        yield None
    elif text.isdecimal() and 1 <= int(text) <= _MOST_PROCESSES:
        try:
            # Processes start afresh: torch's threads, where it is loaded, do not survive a fork.
            with ProcessPoolExecutor(int(text), mp_context=multiprocessing.get_context("spawn")) as pool:
                yield pool
        except BrokenProcessPool as error:
            raise ExecutorError(
                f"a process of executor {text!r} ended early, perhaps for lack of memory; use fewer processes, or none"
            ) from error
    elif text.startswith("tcp://"):
        yield from _dask(text)
    else:
        raise OptionError(
            f"executor {text!r} was given; expected none, a number of local processes from 1 to {_MOST_PROCESSES}, "
            "or a Dask scheduler's tcp://host:port"
        )


def _dask(address: str) -> Iterator[Executor]:
    try:
        distributed = import_module("distributed")
    except ImportError as error:
        raise OptionError(
            f"executor {address!r} is a Dask scheduler, and the package distributed is not installed; "
            "install regraft[dask], or give a number of local processes"
        ) from error
    try:
        client = distributed.Client(address, timeout=_SECONDS_TO_CONNECT)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"the Dask scheduler {address!r} does not answer: {error or type(error).__name__}; "
            "start it, or give a number of local processes"
        ) from error
    lost = (distributed.KilledWorker, CancelledError, asyncio.CancelledError, OSError)
    try:
        with client:
            # A task is work to be done now: no result is looked up by a hash of its arguments.
            executor = client.get_executor(pure=False)
            executor._max_workers = _threads(client, address)  # as pools say how many tasks they run at a time
            yield executor
    except lost as error:
        raise ExecutorError(
            f"the Dask cluster {address!r} broke down: {error or type(error).__name__}; look at its workers' logs, "
            "perhaps they lack memory"
        ) from error


def _threads(client: Any, address: str) -> int:
    """Tasks that run at a time. Raises ``OptionError`` for a cluster without workers, or whose workers lack regraft."""
    threads = sum(client.nthreads().values())
    if not threads:
        raise OptionError(f"the Dask scheduler {address!r} has no workers; start at least one")
    try:
        client.run(_importable)
    except Exception as error:  # Dask raises what the worker raised, or its own
        raise OptionError(
            f"the workers of {address!r} cannot import regraft: {type(error).__name__}; install it where they run"
        ) from error
    return int(threads)


def _importable() -> bool:
    """Sent by name: whoever runs it has this module."""
    return True
