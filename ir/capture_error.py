"""The one error that capture raises."""

from __future__ import annotations

from regraft.ir.errors import RegraftError


class CaptureError(RegraftError, ValueError):
    """A model could not be captured; the message says what was given, what was expected and what to do."""


def first_line(error: BaseException) -> str:
    """``Class: first sentence of the message``, for use inside a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0].split(". ")[0].rstrip(".:") if lines else ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
