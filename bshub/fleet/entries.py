"""A list of models, one a line, written as it would be typed: ``./a.pth --arch timm/resnet18 --num-classes 10``."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bshub.errors import UsageError, printable

MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """One model of a fleet.

    Attributes:
        reference: Model reference.
        arch: Architecture of a weights-only file.
        num_classes: Number of outputs, where nothing else states it.
    """

    reference: str
    arch: str | None = None
    num_classes: int | None = None


def read_entries(path: Path) -> tuple[Entry, ...]:
    """Read a list of models; blank lines and what follows ``#`` are left out, a repeated line counts once.

    Args:
        path: Text, UTF-8.

    Returns:
        The models, in order.

    Raises:
        UsageError: It cannot be read, lists nothing, or a line is not understood.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than {MAX_BYTES >> 20} MiB", hint="split the list")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{path} is not a list of models: {reason}", hint="write one reference a line") from None
    found = [_entry(line, path, number) for number, line in enumerate(lines, 1)]
    entries = tuple(dict.fromkeys(entry for entry in found if entry is not None))
    if not entries:
        raise UsageError(f"{path} lists no model", hint="write one reference a line, like timm/resnet18")
    return entries


def _entry(line: str, path: Path, number: int) -> Entry | None:
    def refuse(reason: str) -> NoReturn:
        raise UsageError(
            f"{path}, line {number}: {reason}: {printable(line, 80)}",
            hint="a line is REFERENCE [--arch ARCH] [--num-classes N]",
        )

    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        refuse(str(error).lower())
    if not words:
        return None
    reference, *options = words
    if reference.startswith("-") or len(options) % 2:
        refuse("a reference comes first, and each option has a value")
    given = dict(zip(options[::2], options[1::2], strict=True))
    if len(given) < len(options) // 2 or given.keys() - {"--arch", "--num-classes"}:
        refuse("only --arch and --num-classes may follow, once each")
    classes = given.get("--num-classes")
    if classes is not None and not (classes.isascii() and classes.isdigit() and 2 <= int(classes) <= 10**6):
        refuse("--num-classes is a whole number from 2")
    return Entry(reference, given.get("--arch"), int(classes) if classes else None)


def folder_digest(folder: Path) -> str:
    """Digest of the names and bytes of all files below a folder: the clean images decide what a run does."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode("utf-8", "replace"))
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
