"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bshub.errors import OutputError

MAX_NAME = 200  # bytes; the temporary folder and the lock have longer names
MANIFEST = "bshub-report.json"  # written last; its presence says that a folder is a whole output of ours


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def recorded_sha256(folder: Path, name: str) -> str | None:
    """The digest that an output's manifest states for one of its files; None where it states none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest["files"][name]["sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return digest if isinstance(digest, str) else None


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
        if os.path.ismount(folder):
            raise OutputError(f"{folder} is a mount point, which no rename reaches", hint="choose a folder inside it")
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


def json_text(data: Any) -> str:
    """JSON, indented, ending in a newline; NaN is refused, and what could steer a terminal is escaped.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    return "".join(ch if ch.isprintable() or ch == "\n" else json.dumps(ch)[1:-1] for ch in text) + "\n"


@contextmanager
def output_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling that takes the folder's place when the block ends well.

    Killed at any moment, the old folder survives whole: where the system can, the two are exchanged in one step, and
    elsewhere a run killed between two renames is mended by the next one. An error or Ctrl-C removes the temporary
    folder. Two runs into one folder: the second is refused.

    Args:
        folder: Where the output shall be.
        overwrite: Whether an earlier output there may be replaced.

    Yields:
        The folder to write into.

    Raises:
        OutputError: The place cannot be used or written to.
    """
    folder = Path(os.path.abspath(folder))
    made: list[Path] = []
    try:
        with _locked(folder, made) as temporary:
            check_output(folder, overwrite)
            temporary.mkdir()
            yield temporary
            check_output(folder, overwrite)  # somebody may have put something there in the meantime
            _sync(temporary)
            _swap(temporary, folder)
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):  # somebody else put something there
                parent.rmdir()
        raise


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder, whose file takes the place of ``path`` when the block ends well.

    Whatever happens, ``path`` is the earlier file or the new one, whole. Two runs into one file: the second is refused.

    Args:
        path: Where the file shall be, in an existing folder; a file that is there is replaced.

    Yields:
        Where to write it.

    Raises:
        OutputError: The place cannot be used or written to.
    """
    path = Path(os.path.abspath(path))
    with _locked(path) as temporary:
        if len(os.fsencode(path.name)) > MAX_NAME:
            raise OutputError(f"the name of {path} is too long", hint="choose a shorter one")
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise OutputError(f"{path} is not a regular file", hint="choose another name")
        temporary.mkdir()
        yield temporary / path.name
        _sync(temporary)
        os.replace(temporary / path.name, path)
        _sync_folder(path.parent)


@contextmanager
def _locked(place: Path, made: list[Path] | None = None) -> Iterator[Path]:
    """Hold the lock of an output; gives the name of its temporary folder, which goes with what is left in it.

    Args:
        place: The output.
        made: Where the parents that are made for it are listed; without it none is made.
    """
    try:
        if made is not None:
            made += [parent for parent in place.parents if not parent.exists()]
            place.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(place)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"cannot write beside {place}: {reason}", hint="choose another --output") from None
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        _clear_leftovers(place)
        yield temporary
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OutputError(
            f"writing {place} failed: {error.strerror or error}",
            hint="free space, then rerun" if full else "look at the folder's rights and its disk, then rerun",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(lock, place)


def _swap(temporary: Path, folder: Path) -> None:
    """Put the new folder in its place; what was there before is then under the temporary name, or gone."""
    if not folder.exists():
        temporary.rename(folder)
    elif not _exchange(temporary, folder):
        old = folder.with_name(f".{folder.name}.old")
        folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        _discard(old)
    _sync_folder(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Give two folders each other's name in one step; False where the system or its disk cannot."""
    import ctypes

    swap, here = 2, -100  # RENAME_EXCHANGE and RENAME_SWAP; AT_FDCWD
    ours, theirs = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "linux":
            return ctypes.CDLL(None).renameat2(here, ours, here, theirs, swap) == 0
        if sys.platform == "darwin":
            return ctypes.CDLL(None).renamex_np(ours, theirs, swap) == 0
    except (OSError, AttributeError):  # a C library without the call
        pass
    return False


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
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot open or flush a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _lock(folder: Path) -> int:
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise OutputError(
                f"another run is writing {folder}", hint="wait for it, or choose another --output"
            ) from None
        # Its last holder may have removed the file between the two calls: such a lock would exclude nobody.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)


def _unlock(handle: int, folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(folder.with_name(f".{folder.name}.lock"))
    os.close(handle)
