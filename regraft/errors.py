"""What goes wrong for users. Every message is one sentence: what was given, what was expected, what to do."""

from __future__ import annotations

from regraft.artifact.errors import ArtifactError
from regraft.ir.capture_error import CaptureError
from regraft.ir.errors import RegraftError

__all__ = [
    "ArtifactError",
    "CaptureError",
    "InputError",
    "OptionError",
    "RegraftError",
    "SourceError",
    "TargetError",
]


class SourceError(RegraftError, ValueError):
    """A model named on the command line cannot be had."""


class TargetError(RegraftError, ValueError):
    """A target that does not exist, or that this version cannot lower to."""


class OptionError(RegraftError, ValueError):
    """An option of ``compile`` that does not exist or does not fit."""


class InputError(RegraftError, ValueError):
    """Inputs that a compiled model has no code for, when the original model is not there to run them."""
