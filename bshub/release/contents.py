"""What of an artifact's folder goes to the Hub, and under which ids the Hub may know it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from bshub.errors import PublishError
from bshub.files import MANIFEST

# What an artifact is made of: nothing else is ever deleted from a repository.
_OWN = frozenset(
    {"model.safetensors", "model.onnx", "config.json", "metrics.json", "README.md", "report.html"}
    | {MANIFEST, "receipt.sigstore.json", "bom.cdx.json"}
)
_OWN_FOLDERS = frozenset({"plots", "dense"})


def read_folder(folder: Path) -> dict[str, frozenset[str]]:
    """Path → the two ids under which the Hub may list the file: git's, and the sha256 of LFS.

    Raises:
        PublishError: No such folder, nothing in it, no artifact, something unreadable, or an own file that is a link.
    """
    ids = {}
    try:
        for parent, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in (*names, *folders):
                path = Path(parent, name)
                inside = path.relative_to(folder).as_posix()
                if path.is_symlink() and is_own(inside):
                    # Left out like other links, it would be missing from the repository, or deleted there.
                    raise PublishError(f"{path} is a symbolic link", hint="put the file itself in its place")
                if name.startswith(".") or not stat.S_ISREG(path.lstat().st_mode):
                    continue
                if not inside.isprintable():
                    raise PublishError(f"{inside!r} is not a file name the Hub would take", hint="rename the file")
                ids[inside] = _ids(path)
    except OSError as err:
        raise PublishError(
            f"{folder} cannot be read: {err.strerror or err}", hint="look at the folder's rights"
        ) from None
    if not ids:
        raise PublishError(f"{folder} holds no files to publish", hint="bshub sanitize writes such a folder")
    if MANIFEST not in ids:
        raise PublishError(
            f"{folder} is no artifact of bshub: it has no {MANIFEST}", hint="give the folder that bshub sanitize wrote"
        )
    return dict(sorted(ids.items()))


def is_own(path: str) -> bool:
    """Whether the path is one that bshub itself writes."""
    return path in _OWN or path.split("/")[0] in _OWN_FOLDERS


def _raise(error: OSError) -> NoReturn:
    """Let os.walk fail where it would skip."""
    raise error


def _ids(path: Path) -> frozenset[str]:
    """Git's id of a file's bytes and their sha256, in one pass."""
    with open(path, "rb") as file:
        git = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        sha256 = hashlib.sha256()
        while block := file.read(1 << 20):
            git.update(block)
            sha256.update(block)
    return frozenset({git.hexdigest(), sha256.hexdigest()})


def read_report(folder: Path) -> dict[str, Any]:
    """The artifact's own report; empty where there is none that can be read."""
    try:
        report = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def images_shown(folder: Path) -> int:
    """Number of clean images that the artifact's page shows, by its report."""
    page = read_report(folder).get("page")
    shown = page.get("clean_images_shown") if isinstance(page, dict) else 0
    return shown if type(shown) is int and (folder / "report.html").is_file() else 0
