"""References to the Hub → files on disk.

Everything a download can meet ends as one `ModelReferenceError` with its cause and a way out. Waiting is bounded:
huggingface_hub 2.4 repeats a failed look-up for 23 s when refused, and for minutes when the host is silent. So `fetch`
looks a file up itself, and lets the client download only what was found. The client compares sizes alone; the sha256
of a large file is its name in the cache, and is compared here.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from bshub.errors import ModelReferenceError, printable
from bshub.files import sha256

__all__ = ["HubFault", "diagnose", "fetch", "refuse", "split_reference"]

LOCAL = "a local folder or file works too: bshub sanitize ./model.safetensors --arch timm/…"
_LOOK_UP_SECONDS = 5.0
WAITS = (0.5, 2.0)
_LONGEST_WAIT = 10.0
_REVISION = re.compile(r"(?!.*(?:\.\.|//|@\{))[A-Za-z0-9_][\w.+/-]{0,254}(?<![./])", re.ASCII)
_SECRET = re.compile(r"\bhf_\w+|\beyJ[\w.-]+|(?i:\bbearer\s+\S+)|(?<=//)[^/@\s]+@|(?<=\w)\?[^\s'\"]+")


@dataclass(frozen=True)
class HubFault:
    """What a failed request to the Hub comes down to.

    Attributes:
        status: HTTP status, None when there was no answer.
        code: The Hub's ``X-Error-Code``, such as ``GatedRepo`` or ``RevisionNotFound``.
        unreachable: There was no connection to the host.
        dropped: There was one, but it broke or no answer came in time.
        offline: The client was told not to use the network (``HF_HUB_OFFLINE``).
        text: The error's own words, one line, without anything that looks like a token.
        retry_after: Seconds the Hub asked to wait, 0 when it did not say.
    """

    status: int | None
    code: str | None
    unreachable: bool
    dropped: bool
    offline: bool
    text: str
    retry_after: float = 0.0

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed a little later."""
        return self.dropped or self.status in (408, 429) or (self.status or 0) >= 500

    @property
    def cause(self) -> str:
        """The cause in plain words, for the cases that do not depend on what was asked."""
        from huggingface_hub import constants

        if self.offline:
            return "HF_HUB_OFFLINE is set, so nothing is asked of the network"
        if self.unreachable or self.dropped:
            lost = "no connection to" if self.unreachable else "no answer from"
            return f"{lost} {urlsplit(constants.ENDPOINT).hostname} ({self.text})"
        if self.status == 429:
            asks = f"; it asks to wait {self.retry_after:.0f} s" if self.retry_after else ""
            return f"the Hub limits the rate of requests (429{asks})"
        if (self.status or 0) >= 500:
            return f"the Hub failed ({self.status})"
        return self.text if self.status is None else f"the Hub answered {self.status} ({self.text})"

    def wait_before_retry(self, least: float | None) -> bool:
        """Wait, where another attempt makes sense: ``least`` seconds, or what the Hub asks for.

        Args:
            least: Seconds; None where no attempt is left.

        Returns:
            False, at once, where the fault will not pass within reasonable time.
        """
        if least is None or not self.passing or self.retry_after > _LONGEST_WAIT:
            return False
        time.sleep(max(least, self.retry_after))
        return True


def diagnose(error: BaseException) -> HubFault:
    """Reduce an exception of huggingface_hub, its HTTP library or hf_xet to what matters.

    The HTTP library's classes are told by name, as the client moved from httpx to httpx2 without an alias.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 10:
        chain.append(cause)
    names = {cls.__name__ for err in chain for cls in type(err).__mro__}
    response: Any = next((r for r in (getattr(err, "response", None) for err in chain) if r is not None), None)
    told = next(filter(None, (getattr(err, "server_message", None) for err in chain)), None)
    words = str(told or chain[-1]).split() or [type(chain[-1]).__name__]  # the innermost says most
    text = printable(_SECRET.sub("***", " ".join(words)), 160)
    if "JSONDecodeError" in names:
        text = "what answered is not the Hub; look at HF_ENDPOINT and the proxy"
    offline = "OfflineModeIsEnabled" in names
    if response is None:
        unreachable = bool(names & {"ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"})
        dropped = not unreachable and "TransportError" in names
        return HubFault(None, None, unreachable, dropped, offline, text)
    headers = response.headers
    asked = re.fullmatch(r"(\d+)|.*;\s*t=(\d+).*", headers.get("Retry-After") or headers.get("RateLimit") or "")
    wait = float(asked[1] or asked[2]) if asked and response.status_code == 429 else 0.0
    return HubFault(response.status_code, headers.get("X-Error-Code"), False, False, offline, text, wait)


def split_reference(reference: str) -> tuple[str, str | None]:
    """Split ``user/repo[@revision]``.

    Args:
        reference: The reference as typed.

    Returns:
        The repository and the branch, tag or commit, None where none is named.

    Raises:
        ModelReferenceError: It does not name a repository, or the revision is not one git would take.
    """
    from huggingface_hub.utils import validate_repo_id

    repo_id, at, revision = reference.partition("@")
    try:
        validate_repo_id(repo_id)
    except ValueError as err:
        raise ModelReferenceError(f"{reference!r} is not a model on the Hub: {err}", hint="write user/repo") from None
    if "/" not in repo_id:
        raise ModelReferenceError(f"{reference!r} names no owner", hint="write user/repo or user/repo@revision")
    if at and not _REVISION.fullmatch(revision):
        raise ModelReferenceError(
            f"{revision!r} is not a revision of {repo_id}", hint="a branch, a tag or a commit id follows the @"
        )
    return repo_id, revision if at else None


def fetch(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """Get one file of a Hub repository, through huggingface_hub's cache.

    Without a network, or while the Hub is down, the copy that an earlier run cached is used.

    Args:
        repo_id: ``user/repo``.
        filename: Path inside the repository.
        revision: Branch, tag or commit; the main branch by default.

    Returns:
        The file inside the cache; not to be written to.

    Raises:
        ModelReferenceError: No such file, no access, no network, no room.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    if split_reference(f"{repo_id}@{revision}" if revision else repo_id) != (repo_id, revision or None):
        raise ModelReferenceError(f"{repo_id!r} is not a repository's name", hint="write user/repo")
    if not all(part.strip(".") for part in re.split(r"[/\\]", filename)):
        raise ModelReferenceError(
            f"{filename!r} is not a file inside a repository",
            hint="name a file by its path in the repository, without ..",
        )
    cached = try_to_load_from_cache(repo_id, filename, revision=revision)
    if isinstance(cached, str) and re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return _verified(Path(cached))
    found = False
    for wait in (*WAITS, None):
        try:
            get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision), timeout=_LOOK_UP_SECONDS)
            found = True
            return _verified(Path(hf_hub_download(repo_id, filename, revision=revision)))
        except ModelReferenceError:
            raise
        # A boundary: the client raises its own, its HTTP library's, hf_xet's and the standard library's errors.
        except Exception as err:
            fault = diagnose(err)
        # A download that breaks off was already resumed five times by the client.
        if (found and fault.dropped) or not fault.wait_before_retry(wait):
            break
    if isinstance(cached, str) and (fault.unreachable or fault.offline or fault.passing):
        logging.getLogger(__name__).warning("%s: taking %s from the cache", fault.cause, filename)
        return _verified(Path(cached))
    refuse(fault, repo_id, filename, revision or "main")


def _verified(path: Path) -> Path:
    """A cached file whose bytes have the sha256 that the Hub states for large files.

    Raises:
        ModelReferenceError: They have not.
    """
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
        raise ModelReferenceError(
            f"{path.name} in the cache is damaged: its sha256 is not {blob.name[:16]}…",
            hint=f"delete {blob} and run the command again",
        )
    return path


def refuse(fault: HubFault, repo_id: str, filename: str, revision: str, otherwise: str = LOCAL) -> NoReturn:
    """Raise what a fault means for somebody who wants a file.

    Args:
        fault: What happened.
        repo_id: ``user/repo``, or ``datasets/user/repo``.
        filename: What was asked for.
        revision: Of which revision.
        otherwise: What to do without the Hub.
    """
    from huggingface_hub import constants

    what = f"{filename} of {repo_id} at revision {revision}"
    page = _SECRET.sub("", f"{constants.ENDPOINT}/{repo_id}")
    if fault.code == "GatedRepo":
        raise ModelReferenceError(f"{repo_id} is gated", hint=f"accept its terms at {page}, then run `hf auth login`")
    if fault.code == "RevisionNotFound":
        raise ModelReferenceError(f"{repo_id} has no revision {revision}", hint=f"see {page}/commits/main")
    if fault.code == "EntryNotFound":
        raise ModelReferenceError(f"{repo_id} holds no {filename} at revision {revision}", hint=otherwise)
    if fault.status in (401, 404):
        raise ModelReferenceError(
            f"{repo_id} is not on the Hub, or is private ({fault.status})",
            hint="check the spelling; for a private one run `hf auth login`",
        )
    if fault.status == 403:
        raise ModelReferenceError(
            f"this account may not read {repo_id} (403)",
            hint="`hf auth whoami` shows the account; its token needs read access to it",
        )
    if fault.unreachable or fault.offline or fault.passing:
        raise ModelReferenceError(f"{fault.cause}; {what} is not in the cache {constants.HF_HUB_CACHE}", hint=otherwise)
    raise ModelReferenceError(f"{what}: {fault.cause}", hint=otherwise)
