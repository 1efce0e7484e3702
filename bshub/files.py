"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bshub.errors import OutputError

MAX_NAME = 200  # bytes; the temporary folder and the lock have longer names
MANIFEST = "bshub-report.json"  # written last; its presence says that a folder is a whole output of ours


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder early, before any work.

    Raises:
        OutputError: It is a file, or not empty and not to be overwritten, or not an output of ours.
    """
    try:
        if len(folder.name.encode()) > MAX_NAME:
            raise OutputError(f"the name of {folder} is too long", hint="choose a shorter --output")
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OutputError(f"{folder} is not a folder", hint="choose another --output")
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder} cannot be used: {error}", hint="choose another --output") from None
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{folder} is not empty", hint="choose another --output, or add --overwrite")
    if not (folder / MANIFEST).is_file():
        raise OutputError(
            f"{folder} holds something else than an earlier output of bshub", hint="choose another --output"
        )


@contextmanager
def output_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling that takes the folder's place when the block ends well.

    Killed at any moment, the old folder survives whole (a run killed between the two renames is mended by the
    next one); an error or Ctrl-C removes the temporary folder. Two runs into one folder: the second is refused.

    Args:
        folder: Where the output shall be.
        overwrite: Whether an earlier output there may be replaced.

    Yields:
        The folder to write into.

    Raises:
        OutputError: The place cannot be used or written to.
    """
    folder = Path(os.path.abspath(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except OSError as error:
        raise OutputError(f"cannot write beside {folder}: {error.strerror}", hint="choose another --output") from None
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        _clear_leftovers(folder)
        check_output(folder, overwrite)
        temporary.mkdir()
        yield temporary
        _sync(temporary)
        _swap(temporary, folder)
    except OSError as error:
        raise OutputError(
            f"writing {folder} failed: {error.strerror or error}", hint="free space, then rerun"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(lock, folder)


def _swap(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    replaced = folder.exists()
    if replaced:
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if replaced:
            old.rename(folder)
        raise
    if replaced:
        _discard(old)


def _discard(old: Path) -> None:
    """Delete a replaced output under a name that the next run knows as litter, should this one be killed."""
    litter = old.with_name(f"{old.name.removesuffix('.old')}.{os.getpid()}0.tmp")
    old.rename(litter)
    shutil.rmtree(litter, ignore_errors=True)


def _clear_leftovers(folder: Path) -> None:
    """Mend what a killed run left: its temporary folders, or an old output that was just moved aside."""
    old = folder.with_name(f".{folder.name}.old")
    if (old / MANIFEST).is_file():  # anything else of that name is not ours
        if folder.exists():
            _discard(old)
        else:
            old.rename(folder)
    ours = re.compile(rf"\.{re.escape(folder.name)}\.\d+\.tmp")
    for leftover in folder.parent.iterdir():
        if ours.fullmatch(leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _lock(folder: Path) -> int:
    handle = os.open(folder.with_name(f".{folder.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise OutputError(f"another run is writing {folder}", hint="wait for it, or choose another --output") from None
    return handle


def _unlock(handle: int, folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(folder.with_name(f".{folder.name}.lock"))
    os.close(handle)
