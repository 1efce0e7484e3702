"""Artifact folder → one commit on the Hub.

Requires: a login of the Hub's own client (`hf auth login`); tokens are never read here. Ensures: a new commit holds
the folder's files, byte for byte, on top of the head that was seen before; or there is no commit and one
`PublishError` says why. A push by somebody else in between is never overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import quote

from bshub.errors import ModelReferenceError, PublishError
from bshub.files import MANIFEST
from bshub.intake.hub import HubFault, diagnose, split_reference
from bshub.release.contents import images_shown, is_own, read_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Published", "publish"]

_T = TypeVar("_T")

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

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return {**asdict(self), "files": list(self.files)}


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
        if MANIFEST not in self.ids:
            return []
        return [path for path in self.ids if path not in files and is_own(path)]


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

    def is_private(self) -> bool:
        """Whether the repository is there and private, as far as this account can see."""
        try:
            return self.head().private
        except PublishError:
            return False

    def refuse(self, fault: HubFault) -> NoReturn:
        """Raise what a fault means for somebody who wants to publish."""
        repo, again = self.repo_id, "try again; what was uploaded is not sent twice"
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
    show_images: bool = False,
) -> Published:
    """Put a folder into a Hub repository, as one commit.

    Args:
        folder: The artifact. Every regular file in it is published, except hidden ones and symbolic links.
        repo_id: ``user/repo``; created where it does not exist.
        private: Create it private; an existing public repository is refused.
        create_pr: Open a pull request instead of pushing to the branch.
        revision: An existing branch; the main branch by default.
        message: The commit message.
        show_images: Publish the clean images that the report page shows, to a public repository as well.

    Returns:
        Where it is now, and whether anything changed.

    Raises:
        PublishError: Bad folder or name, no access, no network, the Hub's refusal, or a competing push.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_name(repo_id, revision)
    files = read_folder(folder)
    place = _Place(HfApi(), repo_id, revision or None)
    shown = 0 if private or show_images else images_shown(folder)
    if shown and not place.is_private():
        raise PublishError(
            f"report.html shows {shown} of the clean images, and {repo_id} is not private; nothing was published",
            hint="add --show-images if the world may see them, or --private, or sanitize with --no-thumbnails",
        )
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


def check_name(repo_id: str, revision: str | None = None) -> None:
    """Refuse what cannot be a repository or a revision.

    Raises:
        PublishError: It is not.
    """
    try:
        if split_reference(f"{repo_id}@{revision}" if revision else repo_id) != (repo_id, revision or None):
            raise PublishError(f"{repo_id!r} is not a repository's name", hint="write user/repo")
    except ModelReferenceError as err:
        raise PublishError(err.message, hint=err.hint) from None


def preview(folder: Path, repo_id: str) -> dict[str, Any]:
    """What :func:`publish` would send; asks nobody.

    Returns:
        ``files`` (path → bytes), ``bytes`` in all, ``clean_images_shown`` and the rendered ``card``.

    Raises:
        PublishError: Bad folder or name.
    """
    check_name(repo_id)
    sizes = {path: (folder / path).stat().st_size for path in read_folder(folder)}
    card = (folder / "README.md").read_text(encoding="utf-8", errors="replace") if "README.md" in sizes else None
    shown = images_shown(folder)
    return {
        "repository": repo_id,
        "files": sizes,
        "bytes": sum(sizes.values()),
        "clean_images_shown": shown,
        "card": card,
    }


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
