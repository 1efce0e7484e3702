"""A data set on the Hub, of image files in folders → a folder on disk.

Written as Hugging Face writes it: ``hf://datasets/user/repo[@revision][/folder]``. The repository's images and its
``metadata.csv`` come through huggingface_hub's cache and are read like any folder; nothing in it is run.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path, PurePosixPath
from typing import Any

from bshub.errors import ImageDataError, ModelReferenceError, printable
from bshub.intake.hub import WAITS, diagnose, refuse, split_reference
from bshub.intake.images import SUFFIXES
from bshub.intake.metadata import TABLES

__all__ = ["fetch_dataset", "is_dataset", "parse_dataset"]

MAX_FILES = 20_000
MAX_BYTES = 8 << 30
_LOOK_UP_SECONDS = 20.0
# One slash is what pathlib leaves of two.
_FORM = re.compile(r"hf:/{1,2}datasets/([^/@]+/[^/@]+)(?:@(refs/[a-z]+/[^/]+|[^/]+))?(?:/(.*))?")
_LOCAL = "a local folder works too: --clean-dir DIR"


def is_dataset(text: object) -> bool:
    """Whether this is meant for a data set on the Hub."""
    return str(text).startswith("hf:")


def fetch_dataset(reference: str) -> tuple[Path, Path]:
    """Get the images of a data set.

    Args:
        reference: ``hf://datasets/user/repo[@revision][/folder]``.

    Returns:
        The folder, and the folder of the cache that its links lead into.

    Raises:
        ImageDataError: No such data set, no access, no network; no image files in it, or too many.
    """
    from huggingface_hub import HfApi, snapshot_download

    repo_id, revision, inside = parse_dataset(reference)
    for wait in (*WAITS, None):
        try:
            info = HfApi().dataset_info(repo_id, revision=revision, files_metadata=True, timeout=_LOOK_UP_SECONDS)
            patterns = _patterns(info.siblings or [], inside, reference)
            snapshot = Path(snapshot_download(repo_id, repo_type="dataset", revision=info.sha, allow_patterns=patterns))
            return snapshot / inside, snapshot.parents[1]
        except ImageDataError:
            raise
        # A boundary, as in `hub.fetch`.
        except Exception as err:
            fault = diagnose(err)
        if not fault.wait_before_retry(wait):
            break
    try:
        refuse(fault, f"datasets/{repo_id}", "image files", revision or "main", _LOCAL)
    except ModelReferenceError as err:
        raise ImageDataError(err.message, hint=err.hint) from None


def parse_dataset(reference: str) -> tuple[str, str | None, str]:
    """Split ``hf://datasets/user/repo[@revision][/folder]``.

    Returns:
        The repository, its revision where one is named, and the folder in it, empty for all of it.

    Raises:
        ImageDataError: It is not of that form.
    """
    found = _FORM.fullmatch(reference)
    if not found:
        raise ImageDataError(
            f"{reference!r} is not a data set on the Hub", hint="write hf://datasets/user/repo[@revision][/folder]"
        )
    repo_id, revision, inside = found[1], found[2], (found[3] or "").strip("/")
    if ".." in inside.split("/") or "\\" in inside:
        raise ImageDataError(
            f"{inside!r} is not a folder of {repo_id}", hint="write hf://datasets/user/repo[@revision][/folder]"
        )
    try:
        split_reference(f"{repo_id}@{revision}" if revision else repo_id)
    except ModelReferenceError as err:
        raise ImageDataError(
            err.message.replace("a model on the Hub", "a data set on the Hub"),
            hint="write hf://datasets/user/repo[@revision][/folder]",
        ) from None
    return repo_id, revision, inside


def _patterns(files: list[Any], inside: str, reference: str) -> list[str]:
    """What of a repository is fetched: the images and tables below the folder, by their suffixes and names."""
    prefix = f"{inside}/" if inside else ""
    below = [file for file in files if file.rfilename.startswith(prefix)]
    chosen = [file for file in below if PurePosixPath(file.rfilename).suffix.lower() in SUFFIXES]
    if not chosen:
        others = sorted({PurePosixPath(file.rfilename).suffix for file in below} - {""})
        holds = f"; it holds {printable(', '.join(others), 80)}" if others else ""
        raise ImageDataError(
            f"{reference} holds no image files{holds}", hint="save its images into class folders: DIR/<class>/<image>"
        )
    size = sum(file.size or 0 for file in chosen)
    if len(chosen) > MAX_FILES or size > MAX_BYTES:
        raise ImageDataError(
            f"{reference} holds {len(chosen)} images of {size >> 20} MiB, more than {MAX_FILES} or "
            f"{MAX_BYTES >> 30} GiB",
            hint="name a folder of it: hf://datasets/user/repo/FOLDER",
        )
    suffixes = sorted({PurePosixPath(file.rfilename).suffix for file in chosen})
    return [glob.escape(prefix) + "*" + glob.escape(suffix) for suffix in suffixes] + [
        glob.escape(prefix) + table for table in TABLES
    ]
