"""The address of one of torchvision's weight files → the file on disk, whole and checked."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from contextlib import suppress
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from bshub.errors import ModelReferenceError
from bshub.files import sha256
from bshub.intake.hub import LOCAL

__all__ = ["fetch_url"]

_WEIGHT_HOSTS = frozenset({"download.pytorch.org"})
_DIGEST = re.compile(r"-([0-9a-f]{8,64})\.pth")
_SILENCE_SECONDS = 20.0
_YOURSELF = "fetch the file yourself and give it with --arch"


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
        raise ModelReferenceError(
            f"{name} carries no digest in its name, so the download could not be checked",
            hint=_YOURSELF,
        )
    target = folder / name
    part = folder / f".{name}.{uuid.uuid4().hex}.part"
    try:
        if target.is_file() and sha256(target).startswith(named[1]):
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
        raise ModelReferenceError(f"{urlsplit(url).hostname} answered {err.code} for {name}", hint=LOCAL) from None
    except (OSError, ValueError, HTTPException) as err:
        cause = getattr(err, "reason", None) or err
        raise ModelReferenceError(
            f"no {name} from {urlsplit(url).hostname} into {folder}: {cause}", hint=LOCAL
        ) from None
    finally:
        with suppress(OSError):
            part.unlink()
    return target


def _check_url(url: str) -> str:
    """Refuse other schemes, hosts and ports; give the file's name."""
    parts = urlsplit(url)
    if parts.scheme != "https" or parts.netloc not in _WEIGHT_HOSTS:
        raise ModelReferenceError(
            f"weights are fetched from https://{min(_WEIGHT_HOSTS)} alone, not from {url}",
            hint=_YOURSELF,
        )
    name = parts.path.rpartition("/")[2]
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII) or name.startswith("."):
        raise ModelReferenceError(f"{url} does not end in a file name", hint=_YOURSELF)
    return name
