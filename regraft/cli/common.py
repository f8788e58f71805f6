"""What commands share: exit codes, messages, JSON on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

REFUSED, USAGE = 1, 2
_TRACEBACK = "REGRAFT_TRACEBACK"

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A .pt2 file, a Hugging Face folder or package.module:factory.")
]
TargetOption = Annotated[
    str | None, typer.Option("--target", help='"cpu", "cuda", "cuda:sm_90"…; by default the model\'s device.')
]
InputsOption = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        help="Example inputs, a safetensors file: keys are argument names, or positions 0, 1, …",
    ),
]


class UsageFault(Exception):
    """The user gave something wrong; the message names it, what was expected and what to do. Exit code 2."""


class Refused(Exception):
    """The work could not be done, or its result is out of tolerance. Exit code 1."""


@contextlib.contextmanager
def guard(as_json: bool) -> Iterator[None]:
    """Turn every failure of a command into one message on stderr and an exit code, never a traceback.

    With ``as_json`` the message is on stdout too, as ``{"error": …, "exit_code": …}``. With the environment variable
    ``REGRAFT_TRACEBACK=1`` failures keep their traceback.
    """
    if os.environ.get(_TRACEBACK) == "1":
        yield
        return
    try:
        yield
    except (typer.Exit, typer.Abort, KeyboardInterrupt, SystemExit, BrokenPipeError):
        raise
    except BaseException as error:  # a factory may raise what it likes
        code, message = _stated(error)
        typer.echo(f"regraft: {message}", err=True)
        if as_json:
            typer.echo(json.dumps({"error": message, "exit_code": code}))
        raise typer.Exit(code) from error


def _stated(error: BaseException) -> tuple[int, str]:
    """The exit code and the one sentence for a failure."""
    if isinstance(error, UsageFault):
        return USAGE, _one_line(error)
    if isinstance(error, Refused):
        return REFUSED, _one_line(error)
    if isinstance(error, OSError):
        return REFUSED, f"{error.filename or 'a file'}: {error.strerror or error}"
    if _is_stated(error):
        return USAGE if _is_usage(error) else REFUSED, _one_line(error)
    said = (str(error).strip().splitlines() or ["no message"])[0]
    return (
        REFUSED,
        f"unexpected {type(error).__name__}: {said} (set {_TRACEBACK}=1 and run again to see where)",
    )


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """Failures that regraft states in its own words inside this block are the user's to mend: exit code 2."""
    try:
        yield
    except Exception as error:
        if _is_stated(error):
            raise UsageFault(_one_line(error)) from error
        raise


def _is_stated(error: BaseException) -> bool:
    """Whether an error's message was written for the user; classes are imported only when something failed."""
    from regraft.ir.errors import RegraftError

    return isinstance(error, RegraftError)


def _is_usage(error: BaseException) -> bool:
    """Whether what the user named does not exist, in contrast to work that was refused."""
    from regraft.errors import OptionError, SourceError, TargetError

    return isinstance(error, (OptionError, SourceError, TargetError))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def emit(as_json: bool, data: Callable[[], Any], text: Callable[[], str]) -> None:
    """Print the result: JSON for programs, text for people."""
    if as_json:
        typer.echo(json.dumps(data(), indent=1, allow_nan=False))
    else:
        typer.echo(text().rstrip("\n"))


def check_output(*paths: Path | None, keep: Iterable[str | Path | None] = ()) -> None:
    """Find out before long work whether its result could be written; raises ``UsageFault``.

    ``keep`` names what is read, and must not be written over.
    """
    taken = {os.path.realpath(path): "is read" for path in keep if path is not None}
    for path in paths:
        if path is None:
            continue
        place = os.path.realpath(path)  # where links lead to; one that leads to itself stays what it is
        if place in taken:
            raise UsageFault(f"{path} {taken[place]} by the same command; give another output")
        if Path(place).is_symlink():
            raise UsageFault(f"{path} is a link that leads to itself; give another output")
        taken[place] = "is written"
        if path.is_dir():
            raise UsageFault(f"{path} is a folder, and the output must be a file; give a file name in it")
        if not path.parent.is_dir():
            raise UsageFault(f"the folder {path.parent} of the output {path.name} does not exist; create it first")
        if not os.access(path.parent, os.W_OK):
            raise UsageFault(f"the folder {path.parent} of the output {path.name} cannot be written; choose another")


@contextlib.contextmanager
def progress(text: str, as_json: bool, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr while the block runs; yields what to call after each of ``total`` steps.

    Nothing is drawn with ``--json`` or when stderr is not a terminal.
    """
    if as_json or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)
