"""The one error that capture raises."""

from __future__ import annotations

import builtins
import re
import traceback

from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from regraft.ir.errors import RegraftError
from regraft.ir.nodes import INTERNAL

_VALUES_ASKED = (GuardOnDataDependentSymNode, DataDependentOutputException)
#: Newer and older releases of torch; the older only stumbles over a dataclass that compares by value.
_UNKNOWN_OUTPUT = re.compile(r"Found <class '([^']+)'> in output, which is not a known type|unhashable type: '([^']+)'")


class CaptureError(RegraftError, ValueError):
    """A model could not be captured; the message says what was given, what was expected and what to do."""


def first_line(error: BaseException) -> str:
    """``Class: first sentence of the message``, for use inside a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0].split(". ")[0].rstrip(".:") if lines else ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def why_not_traced(error: BaseException) -> str:
    """Why tracing stopped and at which line of the model, for use inside a sentence."""
    said = "the next step depends on a tensor's values" if isinstance(error, _VALUES_ASKED) else first_line(error)
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith(INTERNAL)]
    return f"{said}, at {outside[-1].filename}:{outside[-1].lineno} in {outside[-1].name}" if outside else said


def unknown_output(error: BaseException) -> str | None:
    """The name of the class among the outputs whose parts torch does not know, where an export failed of that."""
    found = _UNKNOWN_OUTPUT.search(str(error))
    name = "" if found is None else (found[1] or found[2]).rpartition(".")[2]
    return None if not name or hasattr(builtins, name) else name
