"""An artifact's receipt: is every file the one that the run wrote, and is there nothing else?

Needs the standard library alone, so that a deployment hook costs no import of torch. What cannot be read counts as
changed: a finding says so, nothing is skipped. Without a signature the receipt vouches for accidents, not for
somebody who edits a file and the receipt with it; :mod:`bshub.release.signature` closes that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bshub.errors import printable
from bshub.files import MANIFEST
from bshub.release.finding import PASS, REFUSED, Finding

SIGNATURE = "receipt.sigstore.json"
WEIGHTS = "model.safetensors"
MAX_BYTES = 64 << 20  # of a receipt; a real one is some tens of kilobytes
# Written into a checkout by git and by the Hub's client; no loader of a model reads them.
_FOREIGN = frozenset({".git", ".gitattributes", ".gitignore", ".cache"})
_AGAIN = "bshub sanitize MODEL --clean-dir DIR -o FOLDER writes a whole artifact"
_DOWNLOAD = "copy the files themselves: hf download user/repo --local-dir FOLDER"


@dataclass(frozen=True)
class Receipt:
    """What a receipt states and what is really there.

    Attributes:
        folder: The artifact.
        record: The manifest; empty where it cannot be read.
        digest: sha256 of the manifest's own bytes.
        found: Path → sha256 of each listed file that could be read.
        findings: Of the comparison.
    """

    folder: Path
    record: dict[str, Any]
    digest: str | None
    found: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def whole(self) -> bool:
        """Whether every file is the one that was written, and there is no other."""
        return all(finding.level == PASS for finding in self.findings)

    def get(self, *keys: str) -> Any:
        """A value of the record by its path; None where there is none."""
        value: Any = self.record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_receipt(folder: Path) -> Receipt:
    """Read the manifest of an artifact and compare every file with it.

    Args:
        folder: Exists.

    Returns:
        The receipt; its findings say what is wrong. Nothing is raised for what a folder may hold.
    """
    data, finding = _bytes(folder)
    if data is None:
        return Receipt(folder, {}, None, {}, (finding,) if finding else ())
    digest = hashlib.sha256(data).hexdigest()
    try:
        record = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        listed = _listed(record)
    except (ValueError, RecursionError) as error:
        reason = f"{MANIFEST} is not a receipt: {printable(error, 200)}"
        return Receipt(folder, {}, digest, {}, (Finding("receipt-unreadable", REFUSED, reason, _AGAIN, MANIFEST),))
    found: dict[str, str] = {}
    findings = [*_compare(folder, listed, found), *_surplus(folder, listed)]
    if not findings:
        findings = [Finding("file-changed", PASS, f"{len(listed)} files are as the receipt states")]
    return Receipt(folder, record, digest, found, tuple(findings))


def _bytes(folder: Path) -> tuple[bytes | None, Finding | None]:
    """The manifest's bytes, or why there are none."""
    path = folder / MANIFEST
    try:
        state = path.lstat()
        if stat.S_ISLNK(state.st_mode):
            return None, Finding("file-link", REFUSED, f"{MANIFEST} is a symbolic link", _DOWNLOAD, MANIFEST)
        if not stat.S_ISREG(state.st_mode) or state.st_size > MAX_BYTES:
            reason = f"{MANIFEST} is no file of at most {MAX_BYTES >> 20} MiB"
            return None, Finding("receipt-unreadable", REFUSED, reason, _AGAIN, MANIFEST)
        return path.read_bytes(), None
    except FileNotFoundError:
        reason = f"there is no {MANIFEST}: this model was not sanitized by bshub, or lost its receipt"
        return None, Finding("receipt-missing", REFUSED, reason, f"bshub sanitize {folder} --clean-dir DIR -o FOLDER")
    except OSError as error:
        reason = f"{MANIFEST} cannot be read: {error.strerror}"
        return None, Finding("receipt-unreadable", REFUSED, reason, "look at the file's rights", MANIFEST)


def _listed(record: Any) -> dict[str, dict[str, Any]]:
    """The files that a manifest states, each with a sha256 and a size.

    Raises:
        ValueError: It is not of this form, or a path leads out of the folder.
    """
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError("it lists no files")
    for name, entry in files.items():
        inside = PurePosixPath(name)
        odd = inside.is_absolute() or str(inside) != name or "\\" in name or ":" in name or not name.isprintable()
        if odd or not inside.parts or {".", ".."} & set(inside.parts) or name in (MANIFEST, SIGNATURE):
            raise ValueError(f"{name!r} is not a path inside the artifact")
        digest, size = (entry.get("sha256"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest) or type(size) is not int:
            raise ValueError(f"{name!r} has no sha256 and size")
    return files


def _compare(folder: Path, listed: dict[str, dict[str, Any]], found: dict[str, str]) -> Iterator[Finding]:
    for name, entry in listed.items():
        path = folder / name
        try:
            inside = PurePosixPath(name)
            if any((folder / part).is_symlink() for part in (inside, *inside.parents[:-1])):
                yield Finding("file-link", REFUSED, f"{name} is a symbolic link", _DOWNLOAD, name)
                continue
            # A pipe or a device would block or never end; lstat before open.
            if not stat.S_ISREG(path.lstat().st_mode):
                yield Finding("file-unreadable", REFUSED, f"{name} is no regular file", _AGAIN, name)
                continue
            with path.open("rb") as stream:
                found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            yield Finding("file-missing", REFUSED, f"{name} is listed in the receipt and missing", _AGAIN, name)
            continue
        except OSError as error:
            reason = f"{name} cannot be read: {error.strerror or error}"
            yield Finding("file-unreadable", REFUSED, reason, "look at the file's rights and its disk", name)
            continue
        if found[name] != entry["sha256"]:
            reason = f"{name} was changed: sha256 {found[name][:12]}…, the receipt states {entry['sha256'][:12]}…"
            yield Finding("file-changed", REFUSED, reason, "restore the file, or sanitize the model again", name)


def _surplus(folder: Path, listed: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Files that nobody vouches for: a loader might prefer one of them."""
    unread: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=unread.append):
        top = Path(parent) == folder
        folders[:] = sorted(name for name in folders if not (top and name in _FOREIGN))
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in sorted([*names, *links]):
            inside = Path(parent, name).relative_to(folder).as_posix()
            if inside in listed or inside in (MANIFEST, SIGNATURE) or (top and name in _FOREIGN):
                continue
            reason = f"{inside} is not part of the artifact: the receipt does not list it"
            yield Finding("file-surplus", REFUSED, reason, "move it elsewhere", inside)
    for error in unread:
        yield Finding("file-unreadable", REFUSED, f"a folder cannot be read: {error.strerror}", "look at its rights")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that names a key twice means different things to different readers."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is stated twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
