"""The typer application ``regraft`` and its list of commands."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from regraft.cli.bisect import bisect
from regraft.cli.explain import explain
from regraft.cli.kernels import kernels
from regraft.cli.optimize import optimize
from regraft.cli.permute import permute
from regraft.cli.place import place
from regraft.cli.profile import profile
from regraft.cli.record import record
from regraft.cli.run import run as run_artifact

app = typer.Typer(
    name="regraft",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Rewrite the graph of a PyTorch model and show what each change did. MODEL is a .pt2 file, "
    "a Hugging Face folder (config.json and safetensors) or package.module:factory. "
    "Exit codes: 0 done, 1 refused or out of tolerance, 2 wrong usage.",
)

for command in (optimize, run_artifact, explain, profile, bisect, place, permute, record, kernels):
    app.command(command.__name__)(command)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"regraft {version('regraft')}")
    except PackageNotFoundError:
        typer.echo("regraft, not installed")
    raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Options that come before the command."""


def run() -> None:
    """The console script. What is interrupted cleans up after itself, and a reader that left early is no error."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # for the authors of libraries, not for who runs this
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: temporary files are removed on the way out
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        sys.exit(0)
