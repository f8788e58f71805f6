"""What goes wrong with artifacts."""

from __future__ import annotations

from regraft.ir.errors import RegraftError


class ArtifactError(RegraftError, ValueError):
    """An artifact cannot be written, or a file is not one; the message says what to do."""


def brief(error: BaseException) -> str:
    """The first line of another library's message, cut to a length that fits into a sentence."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
