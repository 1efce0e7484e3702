"""The exception tree. Every error that a user can cause or meet is one of these:

    BshubError                     exit code 2 unless said otherwise
    ├── UsageError                 a setting, option or path that cannot be
    ├── ModelReferenceError        a model reference that leads nowhere (no such model, no network)
    ├── CheckpointError            bytes that are not an admissible checkpoint for this model
    ├── ImageDataError             a folder or file that does not hold the images it should
    ├── TriggerError               a trigger file that cannot be read
    ├── TraceError                 a model whose computation cannot be recorded
    ├── SurgeryError               exit code 1: the proof after surgery failed; nothing was kept
    ├── ExportError                exit code 1: the ONNX file does not compute what the model computes
    ├── OutputError                the output folder cannot be written
    ├── PublishError               the Hub refused
    └── InconclusiveError          exit code 3: nothing could be examined

An error carries its cause as text and, where one exists, the next command to type (``hint``).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

__all__ = [
    "BshubError",
    "CheckpointError",
    "ExportError",
    "ImageDataError",
    "InconclusiveError",
    "ModelReferenceError",
    "OutputError",
    "PublishError",
    "SurgeryError",
    "TraceError",
    "TriggerError",
    "UsageError",
    "choices",
    "printable",
    "redacted",
]

_TOKEN = re.compile(r"\bhf_\w{20,}|\beyJ[\w-]+\.[\w.-]+|(?i:\bbearer\s+)\S+|(?<=//)[^/@\s]+@")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)


def printable(text: object, limit: int = 400) -> str:
    """Make foreign text safe to print: control and bidi characters become ``\\x..`` escapes.

    Args:
        text: Anything; ``str()`` of it is taken.
        limit: Longest result; the rest becomes an ellipsis.

    Returns:
        One line of printable characters, at most ``limit`` of them.
    """
    safe = "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode("ascii") for ch in str(text))
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def redacted(text: str) -> str:
    """Text without secrets: what looks like a token, and the values of the environment's own.

    Args:
        text: Anything that is about to be shown, such as a traceback.

    Returns:
        The text with ``***`` in their place.
    """
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return _TOKEN.sub("***", text)


def choices(typed: str, known: Iterable[str]) -> str:
    """What to say to somebody who typed a name that there is not.

    Args:
        typed: The name.
        known: Those that there are, in the order in which they are listed.

    Returns:
        The nearest of them as a question, and all of them.
    """
    names = list(known)
    near = difflib.get_close_matches(typed.casefold(), names, n=1, cutoff=0.6)
    return (f"did you mean {near[0]}? It is " if near else "") + f"one of {', '.join(names)}"


class BshubError(Exception):
    """Root of all errors.

    Args:
        message: What went wrong, one line.
        hint: What to do or type next.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = printable(message)
        self.hint = printable(hint) if hint else None
        super().__init__(self.message if not self.hint else f"{self.message} ({self.hint})")


class UsageError(BshubError):
    """A setting, option or path that cannot be."""


class ModelReferenceError(BshubError):
    """A model reference that leads nowhere."""


class CheckpointError(BshubError):
    """Bytes that are not an admissible checkpoint for this model."""


class ImageDataError(BshubError):
    """A folder or file that does not hold the images it should."""


class TriggerError(BshubError):
    """A trigger file that cannot be read or applied."""


class TraceError(BshubError):
    """A model whose computation cannot be recorded.

    Args:
        message: What went wrong, one line.
        hint: What to do or type next.
        module: Qualified name of the module that failed.
    """

    def __init__(self, message: str, *, hint: str | None = None, module: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.module = module


class SurgeryError(BshubError):
    """The proof after surgery failed; nothing was kept."""

    exit_code = 1


class ExportError(BshubError):
    """The ONNX file does not compute what the model computes."""

    exit_code = 1


class OutputError(BshubError):
    """The output folder cannot be written."""


class PublishError(BshubError):
    """The Hub refused, or could not be reached."""


class InconclusiveError(BshubError):
    """Nothing could be examined: too few samples, no conv-BN pair."""

    exit_code = 3
