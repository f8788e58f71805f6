"""What commands share: exit codes, messages, JSON on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

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
def guard() -> Iterator[None]:
    """Turn every failure of a command into one message on stderr and an exit code, never a traceback.

    With the environment variable ``REGRAFT_TRACEBACK=1`` failures keep their traceback.
    """
    if os.environ.get(_TRACEBACK) == "1":
        yield
        return
    try:
        yield
    except (typer.Exit, typer.Abort, KeyboardInterrupt):
        raise
    except UsageFault as error:
        _fail(USAGE, str(error))
    except Refused as error:
        _fail(REFUSED, str(error))
    except OSError as error:
        _fail(REFUSED, f"{error.filename or 'a file'}: {error.strerror or error}")
    except Exception as error:
        if _is_stated(error):
            _fail(USAGE if _is_usage(error) else REFUSED, _one_line(error))
        said = str(error).strip().splitlines()
        _fail(
            REFUSED,
            f"unexpected {type(error).__name__}: {said[0] if said else 'no message'} "
            f"(set {_TRACEBACK}=1 and run again to see where)",
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


def _is_stated(error: Exception) -> bool:
    """Whether an error's message was written for the user; classes are imported only when something failed."""
    from regraft.errors import ArtifactError, RegraftError
    from regraft.report import ReportError

    return isinstance(error, (RegraftError, ArtifactError, ReportError))


def _is_usage(error: Exception) -> bool:
    """Whether what the user named does not exist, in contrast to work that was refused."""
    from regraft.errors import OptionError, SourceError, TargetError

    return isinstance(error, (OptionError, SourceError, TargetError))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _fail(code: int, message: str) -> NoReturn:
    typer.echo(f"regraft: {message}", err=True)
    raise typer.Exit(code)


def emit(as_json: bool, data: Callable[[], Any], text: Callable[[], str]) -> None:
    """Print the result: JSON for programs, text for people."""
    if as_json:
        typer.echo(json.dumps(data(), indent=1, allow_nan=False))
    else:
        typer.echo(text().rstrip("\n"))


def check_output(*paths: Path | None) -> None:
    """Find out before long work whether its result could be written; raises ``UsageFault``."""
    for path in paths:
        if path is None:
            continue
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
