"""References to the Hub and to torchvision's weights → files on disk.

Everything a download can meet ends as one `ModelReferenceError` with its cause and a way out. Waiting is bounded:
huggingface_hub 2.4 repeats a failed look-up for 23 s when refused, and for minutes when the host is silent. So `fetch`
looks a file up itself, and lets the client download only what was found.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from bshub.errors import ModelReferenceError, printable

__all__ = ["HubFault", "diagnose", "fetch", "fetch_url", "split_reference"]

_LOCAL = "a local folder or file works too: bshub sanitize ./model.safetensors --arch timm/…"
_LOOK_UP_SECONDS = 5.0
_WAITS = (0.5, 2.0)
_LONGEST_WAIT = 10.0
_REVISION = re.compile(r"(?!.*(?:\.\.|//|@\{))[A-Za-z0-9_][\w.+/-]{0,254}(?<![./])", re.ASCII)
_SECRET = re.compile(r"\bhf_\w+|\beyJ[\w.-]+|(?i:\bbearer\s+\S+)|(?<=//)[^/@\s]+@|(?<=\w)\?[^\s'\"]+")

_WEIGHT_HOSTS = frozenset({"download.pytorch.org"})
_DIGEST = re.compile(r"-([0-9a-f]{8,64})\.pth")
_SILENCE_SECONDS = 20.0


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
        raise ModelReferenceError(f"{filename!r} is not a file inside a repository")
    cached = try_to_load_from_cache(repo_id, filename, revision=revision)
    if isinstance(cached, str) and re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return Path(cached)
    found = False
    for wait in (*_WAITS, None):
        try:
            get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision), timeout=_LOOK_UP_SECONDS)
            found = True
            return Path(hf_hub_download(repo_id, filename, revision=revision))
        # A boundary: the client raises its own, its HTTP library's, hf_xet's and the standard library's errors.
        except Exception as err:
            fault = diagnose(err)
        # A download that breaks off was already resumed five times by the client.
        if (found and fault.dropped) or not fault.wait_before_retry(wait):
            break
    if isinstance(cached, str) and (fault.unreachable or fault.offline or fault.passing):
        logging.getLogger(__name__).warning("%s: taking %s from the cache", fault.cause, filename)
        return Path(cached)
    _refuse(fault, repo_id, filename, revision or "main")


def _refuse(fault: HubFault, repo_id: str, filename: str, revision: str) -> NoReturn:
    """Raise what `fetch` has to say about a fault."""
    from huggingface_hub import constants

    what = f"{filename} of {repo_id} at revision {revision}"
    page = _SECRET.sub("", f"{constants.ENDPOINT}/{repo_id}")
    if fault.code == "GatedRepo":
        raise ModelReferenceError(f"{repo_id} is gated", hint=f"accept its terms at {page}, then run `hf auth login`")
    if fault.code == "RevisionNotFound":
        raise ModelReferenceError(f"{repo_id} has no revision {revision}", hint=f"see {page}/commits/main")
    if fault.code == "EntryNotFound":
        raise ModelReferenceError(f"{repo_id} holds no {filename} at revision {revision}", hint=_LOCAL)
    if fault.status in (401, 404):
        raise ModelReferenceError(
            f"{repo_id} is not on the Hub, or is private ({fault.status})",
            hint="check the spelling; for a private model run `hf auth login`",
        )
    if fault.status == 403:
        raise ModelReferenceError(
            f"this account may not read {repo_id} (403)",
            hint="`hf auth whoami` shows the account; its token needs read access to the model",
        )
    if fault.unreachable or fault.offline or fault.passing:
        raise ModelReferenceError(f"{fault.cause}; {what} is not in the cache {constants.HF_HUB_CACHE}", hint=_LOCAL)
    raise ModelReferenceError(f"{what}: {fault.cause}", hint=_LOCAL)


class _SameHosts(HTTPRedirectHandler):
    """Follows a redirect only to where `fetch_url` would have gone by itself."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def fetch_url(url: str, folder: Path) -> Path:
    """Download one of torchvision's weight files, unless the folder has it.

    The file's name ends in the first hex digits of its sha256, as torch.hub has it (``resnet18-f37072fd.pth``); they
    are checked, on a cached file too. The file appears under its name only when whole.

    Args:
        url: https address on download.pytorch.org.
        folder: Where torch.hub keeps checkpoints; made where missing.

    Raises:
        ModelReferenceError: Another host, no digest in the name, no network, wrong bytes, no room.
    """
    name = _check_url(url)
    named = _DIGEST.search(name)
    if named is None:
        raise ModelReferenceError(f"{name} carries no digest in its name, so the download could not be checked")
    target = folder / name
    part = folder / f".{name}.{uuid.uuid4().hex}.part"
    try:
        if target.is_file() and _sha256(target).startswith(named[1]):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        opener = build_opener(_SameHosts)
        with opener.open(url, timeout=_SILENCE_SECONDS) as answer, open(part, "xb") as file:
            digest = hashlib.sha256()
            while block := answer.read(1 << 20):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        if not digest.hexdigest().startswith(named[1]):
            raise ModelReferenceError(
                f"{name} arrived with sha256 {digest.hexdigest()[:16]}…, not {named[1]}…", hint="run the command again"
            )
        os.replace(part, target)
    except HTTPError as err:
        raise ModelReferenceError(f"{urlsplit(url).hostname} answered {err.code} for {name}", hint=_LOCAL) from None
    except (OSError, ValueError, HTTPException) as err:
        cause = getattr(err, "reason", None) or err
        raise ModelReferenceError(
            f"no {name} from {urlsplit(url).hostname} into {folder}: {cause}", hint=_LOCAL
        ) from None
    finally:
        with suppress(OSError):
            part.unlink()
    return target


def _sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_url(url: str) -> str:
    """Refuse other schemes, hosts and ports; give the file's name."""
    parts = urlsplit(url)
    if parts.scheme != "https" or parts.netloc not in _WEIGHT_HOSTS:
        raise ModelReferenceError(f"weights are fetched from https://{min(_WEIGHT_HOSTS)} alone, not from {url}")
    name = parts.path.rpartition("/")[2]
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII) or name.startswith("."):
        raise ModelReferenceError(f"{url} does not end in a file name")
    return name
