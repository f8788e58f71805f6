"""Where independent work runs: in this process, in a pool of local ones, or on a Dask cluster."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module

from regraft.errors import OptionError

_MOST_PROCESSES = 512
_SECONDS_TO_CONNECT = "10s"


@contextmanager
def executor_of(text: str | None) -> Iterator[Executor | None]:
    """The executor that ``text`` names, shut down at the end: None or "none", a number of processes, or the address
    of a Dask scheduler (tcp://host:port). Raises ``OptionError`` for anything else and where Dask is not installed or
    does not answer.
    """
    if text is None or text == "none":
        yield None
    elif text.isdecimal() and 1 <= int(text) <= _MOST_PROCESSES:
        # Processes start afresh: torch's threads, where it is loaded, do not survive a fork.
        with ProcessPoolExecutor(int(text), mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool
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
            "install it, or give a number of local processes"
        ) from error
    try:
        client = distributed.Client(address, timeout=_SECONDS_TO_CONNECT)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"the Dask scheduler {address!r} does not answer: {error or type(error).__name__}; "
            "start it, or give a number of local processes"
        ) from error
    with client:
        yield client.get_executor()
