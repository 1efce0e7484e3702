"""Artifact folder → one commit on the Hub.

Requires: a login of the Hub's own client (`hf auth login`); tokens are never read here. Ensures: a new commit holds
the folder's files, byte for byte, on top of the head that was seen before; or there is no commit and one
`PublishError` says why. A push by somebody else in between is never overwritten.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import quote

from bshub.errors import ModelReferenceError, PublishError
from bshub.intake.hub import HubFault, diagnose, split_reference

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Published", "publish"]

_T = TypeVar("_T")

# What an artifact is made of, beside plots/: nothing else is ever deleted from a repository.
_OWN = frozenset({"model.safetensors", "model.onnx", "config.json", "metrics.json", "bshub-report.json", "README.md"})
_REPORT = "bshub-report.json"

_WAITS = (1.0, 3.0)
# Seconds to connect, read, write and wait for a free connection; the client's own default is for ever.
_TIMEOUTS = (10.0, 60.0, 60.0, 10.0)


@dataclass(frozen=True)
class Published:
    """Where the artifact is now.

    Attributes:
        url: The repository, its branch, or the pull request.
        commit: The commit that holds the files.
        files: The artifact's paths in the repository, sorted.
        unchanged: The repository held exactly these files; no commit was made.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    unchanged: bool


@dataclass(frozen=True)
class _Head:
    """A commit: whether its repository is private and, per path, the file's sha256 (LFS) or git id."""

    commit: str
    private: bool
    ids: Mapping[str, str]

    def lacks(self, files: Mapping[str, frozenset[str]]) -> list[str]:
        """Paths that are missing or hold other bytes."""
        return [path for path, ids in files.items() if self.ids.get(path) not in ids]

    def leftovers(self, files: Mapping[str, frozenset[str]]) -> list[str]:
        """Paths of an earlier artifact that the new one does not have."""
        # Without a report there was no artifact: the files are somebody's own, whatever their names.
        if _REPORT not in self.ids:
            return []
        return [path for path in self.ids if path not in files and _is_own(path)]


@dataclass(frozen=True)
class _Place:
    """A branch of a repository, and the ways to ask the Hub about it."""

    api: HfApi
    repo_id: str
    revision: str | None

    @property
    def url(self) -> str:
        """The web page."""
        branch = f"/tree/{quote(self.revision, safe='')}" if self.revision else ""
        return f"{self.api.endpoint}/{self.repo_id}{branch}"

    def ask(self, call: Callable[[], _T]) -> _T:
        """Run a call that can be repeated without harm, a few times where that may help."""
        for wait in (*_WAITS, None):
            try:
                with _bounded_waiting():
                    return call()
            # A boundary: the client raises its own, its HTTP library's and the standard library's errors.
            except Exception as err:
                fault = diagnose(err)
            if not fault.wait_before_retry(wait):
                break
        self.refuse(fault)

    def head(self, revision: str | None = None) -> _Head:
        """What the branch, or a given commit, holds now."""
        name = revision or self.revision or "main"
        asked: dict[str, Any] = {"revision": name, "files_metadata": True, "timeout": _TIMEOUTS[1]}
        info = self.ask(lambda: self.api.model_info(self.repo_id, **asked))
        ids = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id or "" for file in info.siblings or []}
        return _Head(info.sha or "", bool(info.private), ids)

    def refuse(self, fault: HubFault) -> NoReturn:
        """Raise what a fault means for somebody who wants to publish."""
        repo, again = self.repo_id, "run the same command again; what was uploaded is not sent twice"
        means = {
            400: (f"the Hub refused the card or a file (400: {fault.text})", "look at README.md's first lines"),
            401: (f"the Hub does not know who publishes to {repo} (401)", "run `hf auth login`; the token must write"),
            403: (
                f"this account may not write to {repo} (403)",
                "`hf auth whoami` shows the account, `hf auth login` takes a token that may write; or use --create-pr",
            ),
            404: (
                f"{repo} has no revision {self.revision or 'main'}, or is private (404)",
                f"`hf repos branch create {repo} {self.revision or 'NAME'}` makes it; `hf auth whoami` shows who asks",
            ),
            409: (f"another operation on {repo} is in progress (409)", again),
            412: (
                f"somebody pushed to {repo} in the meantime; nothing was overwritten (412)",
                "look at their commit, then publish again, or use --create-pr",
            ),
        }
        hint = "unset HF_HUB_OFFLINE" if fault.offline else "check the network and HF_ENDPOINT"
        hint = hint if fault.offline or fault.unreachable else again
        cause, hint = means.get(fault.status or 0, (fault.cause, hint))
        raise PublishError(cause if repo in cause else f"{repo}: {cause}", hint=hint)


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> Published:
    """Put a folder into a Hub repository, as one commit.

    Args:
        folder: The artifact. Every regular file in it is published, except hidden ones and symbolic links.
        repo_id: ``user/repo``; created where it does not exist.
        private: Create it private; an existing public repository is refused.
        create_pr: Open a pull request instead of pushing to the branch.
        revision: An existing branch; the main branch by default.
        message: The commit message.

    Raises:
        PublishError: Bad folder or name, no access, no network, the Hub's refusal, or a competing push.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    try:
        if split_reference(f"{repo_id}@{revision}" if revision else repo_id) != (repo_id, revision or None):
            raise PublishError(f"{repo_id!r} is not a repository's name", hint="write user/repo")
    except ModelReferenceError as err:
        raise PublishError(err.message, hint=err.hint) from None
    files = _read_folder(folder)
    place = _Place(HfApi(), repo_id, revision or None)
    # `or None` leaves the choice to the organization's default.
    place.ask(lambda: place.api.create_repo(repo_id, private=private or None, exist_ok=True))
    before = place.head()
    if private and not before.private:
        raise PublishError(
            f"{repo_id} exists and is public; nothing was published",
            hint=f"make it private with `hf repos settings {repo_id} --private`, or publish without --private",
        )
    leftovers = before.leftovers(files)
    if not leftovers and not before.lacks(files):
        return Published(place.url, before.commit, tuple(files), unchanged=True)

    def commit() -> tuple[str, str]:
        made = place.api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path, folder / path) for path in files),
                *(CommitOperationDelete(path, is_folder=False) for path in leftovers),
            ],
            commit_message=message or "Publish a bshub artifact",
            revision=place.revision,
            create_pr=create_pr,
            parent_commit=before.commit,
        )
        return made.oid, made.pr_url or place.url

    oid, url = _commit_once(place, before, files, commit, create_pr)
    try:
        missing = place.head(oid).lacks(files)
    except PublishError as err:
        again = "publish again: where all arrived, it says so and changes nothing"
        raise PublishError(f"commit {oid[:12]} was made, but not read back: {err.message}", hint=again) from None
    if missing:
        raise PublishError(
            f"commit {oid[:12]} of {repo_id} does not hold {missing[0]} as it was in {folder}",
            hint="the file changed while it was read, or the repository's .gitignore leaves it out",
        )
    return Published(url, oid, tuple(files), unchanged=False)


def _commit_once(
    place: _Place,
    before: _Head,
    files: Mapping[str, frozenset[str]],
    commit: Callable[[], tuple[str, str]],
    create_pr: bool,
) -> tuple[str, str]:
    """Commit; after a fault that may have hidden a success, look before trying again."""
    # One repetition: the client repeats the uploads before the commit by itself.
    for wait in (_WAITS[0], None):
        try:
            with _bounded_waiting():
                return commit()
        # The same boundary as in `_Place.ask`.
        except Exception as err:
            fault = diagnose(err)
        # Whether a pull request was opened cannot be seen from the branch, and a second one would be a nuisance.
        if (create_pr and fault.status != 429) or not fault.wait_before_retry(wait):
            break
        now = place.head()
        if now.commit != before.commit:
            if now.lacks(files) or now.leftovers(files):
                fault = HubFault(412, None, False, False, False, "")
                break
            return now.commit, place.url
    place.refuse(fault)


@contextmanager
def _bounded_waiting() -> Iterator[None]:
    """Give the client's shared session a time limit, unless whoever set it up did."""
    from huggingface_hub import get_session

    session = get_session()
    before = session.timeout
    if before.read is None:
        session.timeout = _TIMEOUTS
    try:
        yield
    finally:
        session.timeout = before


def _read_folder(folder: Path) -> dict[str, frozenset[str]]:
    """Path → the two ids under which the Hub may list the file: git's, and the sha256 of LFS.

    Raises:
        PublishError: No such folder, nothing in it, something unreadable, or one of the artifact's files is a link.
    """
    ids = {}
    try:
        for parent, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in (*names, *folders):
                path = Path(parent, name)
                inside = path.relative_to(folder).as_posix()
                if path.is_symlink() and _is_own(inside):
                    # Left out like other links, it would be missing from the repository, or deleted there.
                    raise PublishError(f"{path} is a symbolic link", hint="put the file itself in its place")
                if name.startswith(".") or not stat.S_ISREG(path.lstat().st_mode):
                    continue
                if not inside.isprintable():
                    raise PublishError(f"{inside!r} is not a file name the Hub would take", hint="rename the file")
                ids[inside] = _ids(path)
    except OSError as err:
        raise PublishError(f"{folder} cannot be read: {err.strerror or err}") from None
    if not ids:
        raise PublishError(f"{folder} holds no files to publish", hint="bshub sanitize writes such a folder")
    return dict(sorted(ids.items()))


def _is_own(path: str) -> bool:
    """Whether the path is one that bshub itself writes."""
    return path in _OWN or path.split("/")[0] == "plots"


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
