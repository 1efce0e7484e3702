"""A stand-in for the Hugging Face Hub on 127.0.0.1, enough of it to serve the real client.

Repositories live in memory. Large files take the git-LFS route (one part, or several above ``part_size``) and are
served in place. Use it in a child process through ``environment(hub.url, cache)``, which sets what huggingface_hub
reads while it is imported, or in this process through ``point_client_at(hub.url, monkeypatch, cache)``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from card_rules import faults

LARGE = (".safetensors", ".onnx", ".bin", ".png")


@dataclass(eq=False)
class Refusal(Exception):
    """An answer that is not 200, with ``message`` in a JSON body; status 0 hangs up.

    An injected one meets the next ``times`` requests whose ``METHOD /path`` matches ``pattern``, after ``delay``
    seconds; with ``after`` the request is carried out first and only its answer is lost. With status 200 the answer is
    the sound one, late by ``delay``, or with ``cut`` broken off in the middle.
    """

    status: int
    code: str = ""
    message: str = "refused"
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    pattern: str = ""
    times: int = 0
    delay: float = 0.0
    after: bool = False
    cut: bool = False


@dataclass
class Repo:
    """Commits (oid → path → bytes) and the names that point at them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, ref: str, files: dict[str, bytes]) -> str:
        """Record a tree as the next commit of ``ref``."""
        oid = hashlib.sha1(f"{len(self.commits)} {ref}".encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        return oid

    def head(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit id means."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, "RevisionNotFound", "Invalid rev id")
        return oid


class LoopbackHub:
    """The server; a context manager. ``requests`` lists every ``METHOD /path`` seen."""

    part_size = 1 << 16

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Refusal] = []
        self.requests: list[str] = []
        self.authorizations: set[str] = set()
        self.before: Callable[[str], None] = lambda request: None
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def seed(self, repo_id: str, files: dict[str, bytes], revision: str = "main", private: bool = False) -> str:
        """Push files on top of a branch behind the client's back; gives the commit."""
        repo = self.repos.setdefault(repo_id, Repo(private=private))
        return repo.add(revision, {**repo.commits.get(repo.refs.get(revision, ""), {}), **files})

    def fail(self, pattern: str, status: int, times: int = 1, **more: Any) -> None:
        """Inject a fault; see `Refusal`."""
        self.faults.append(Refusal(status, pattern=pattern, times=times, **more))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The tree that a revision is."""
        return self.repo(repo_id).commits[self.repo(repo_id).head(revision)]

    def repo(self, repo_id: str) -> Repo:
        """The repository, or the Hub's 404."""
        if repo_id not in self.repos:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return self.repos[repo_id]

    def count(self, start: str) -> int:
        """How many requests begin so."""
        return sum(request.startswith(start) for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    """One request: fault, else the first route that matches."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer's second write waits 40 ms for a delayed ACK

    def serve(self) -> None:
        """Answer any method; a HEAD gets the length without the body."""
        url = urlsplit(self.path)
        request, self.query = f"{self.command} {unquote(url.path)}", parse_qs(url.query)
        self.payload = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(request)
        self.hub.authorizations.add(self.headers.get("Authorization", ""))
        fault = next((f for f in self.hub.faults if f.times and re.search(f.pattern, request)), None)
        try:
            sound = fault is None or fault.status == 200
            answer = self.route(request) if sound or fault.after else None
            if fault:
                fault.times -= 1
                time.sleep(fault.delay)
            if not sound:
                raise fault
            status, (body, headers) = 200, answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
        except Refusal as refusal:
            status, body = refusal.status, json.dumps({"error": refusal.message, **refusal.body}).encode()
            headers = refusal.headers | ({"X-Error-Code": refusal.code} if refusal.code else {})
        self.close_connection |= not status
        if status:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            broken = fault is not None and fault.cut
            self.close_connection |= broken
            self.wfile.write(b"" if self.command == "HEAD" else body[: len(body) // 2] if broken else body)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def route(self, request: str) -> Any:
        """Run the first route that matches."""
        self.hub.before(request)
        with self.hub.lock:
            for pattern, answer in ROUTES:
                if match := re.fullmatch(pattern, request):
                    return answer(self, *match.groups())
        raise Refusal(404, message=f"no route for {request}")

    def log_message(self, *_: object) -> None:
        """Keep the test's stderr clean."""


def oid(path: str, data: bytes) -> str:
    """The id under which the Hub compares a file: sha256 in LFS, else git's."""
    if path.endswith(LARGE) and data:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def create(h: Handler) -> dict[str, str]:
    """Create a repository; the 409 for an existing one carries its address, as the Hub's does."""
    asked = json.loads(h.payload)
    repo_id = f"{asked['organization'] or 'me'}/{asked['name']}"
    answer = {"url": f"{h.hub.url}/{repo_id}"}
    if repo_id in h.hub.repos:
        raise Refusal(409, message="You already created this model repo", body=answer)
    h.hub.seed(repo_id, {".gitattributes": b"*.onnx filter=lfs\n"}, private=asked.get("visibility") == "private")
    return answer


def validate(h: Handler) -> dict[str, Any]:
    """Judge a card's front matter."""
    wrong = faults(json.loads(h.payload)["content"])
    if wrong:
        raise Refusal(400, message=wrong[0], body={"errors": [{"message": text} for text in wrong], "warnings": []})
    return {"errors": [], "warnings": []}


def listing(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Files as the repository's page and as the tree list them."""
    rows = []
    for path, data in files.items():
        name, size = oid(path, data), len(data)
        lfs = {"size": size, "sha256": name, "oid": name, "pointerSize": 130} if len(name) == 64 else None
        rows.append({"type": "file", "path": path, "rfilename": path, "size": size, "lfs": lfs})
        rows[-1] |= {"oid": name[:40], "blobId": name[:40]}
    return rows


def info(h: Handler, repo_id: str, revision: str | None) -> dict[str, Any]:
    """The repository, a commit and its files."""
    repo, rows = h.hub.repo(repo_id), listing(h.hub.files(repo_id, revision or "main"))
    return {"id": repo_id, "sha": repo.head(revision or "main"), "private": repo.private, "siblings": rows}


def preupload(h: Handler, repo_id: str, revision: str) -> dict[str, Any]:
    """Say per file whether it goes into git or into LFS, and what is there already."""
    files = h.hub.files(repo_id, revision)
    ignored = files.get(".gitignore", b"").decode().split()
    answer = []
    for path in (file["path"] for file in json.loads(h.payload)["files"]):
        mode = "lfs" if path.endswith(LARGE) else "regular"
        known = oid(path, files[path]) if path in files else None
        answer.append({"path": path, "uploadMode": mode, "shouldIgnore": path in ignored, "oid": known})
    return {"files": answer}


def batch(h: Handler, repo_id: str) -> dict[str, Any]:
    """Give upload addresses for the objects that are not here yet."""
    h.hub.repo(repo_id)
    objects = json.loads(h.payload)["objects"]
    for wanted in (wanted for wanted in objects if wanted["oid"] not in h.hub.objects):
        href, parts = f"{h.hub.url}/_lfs/{wanted['oid']}", -(-wanted["size"] // h.hub.part_size)
        header = {"chunk_size": str(h.hub.part_size)} | {str(n): f"{href}/{n}" for n in range(1, parts + 1)}
        upload = {"href": href, "header": header if parts > 1 else {}}
        wanted["actions"] = {"upload": upload, "verify": {"href": f"{href}/verify"}}
    return {"transfer": "basic", "objects": objects}


def put(h: Handler, name: str) -> tuple[bytes, dict[str, str]]:
    """Take an object (``sha256``), or one part of it (``sha256/number``)."""
    h.hub.objects[name] = h.payload
    return b"", {"ETag": '"x"'}


def finish(h: Handler, sha256: str, verify: str | None) -> dict[str, str]:
    """Put the parts of an object together, or compare its bytes with the id they were announced under."""
    if verify is None:
        numbers = [part["partNumber"] for part in json.loads(h.payload)["parts"]]
        h.hub.objects[sha256] = b"".join(h.hub.objects[f"{sha256}/{number}"] for number in numbers)
    elif hashlib.sha256(h.hub.objects.get(sha256, b"")).hexdigest() != sha256:
        raise Refusal(422, message="LFS object does not match its sha256")
    return {}


def commit(h: Handler, repo_id: str, revision: str) -> dict[str, Any]:
    """Apply one commit, whole or not at all; 412 when the parent is no longer the head."""
    repo = h.hub.repo(repo_id)
    head = repo.head(revision)
    files = dict(repo.commits[head])
    for line in map(json.loads, h.payload.splitlines()):
        value = line["value"]
        if line["key"] == "header" and value.get("parentCommit", head) != head:
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        if line["key"] == "lfsFile":
            files[value["path"]] = h.hub.objects[value["oid"]]
        if line["key"] == "deletedFile":
            del files[value["path"]]
    number, url = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1, f"{h.hub.url}/{repo_id}"
    new = repo.add(f"refs/pr/{number}" if "create_pr" in h.query else revision, files)
    return {"commitOid": new, "commitUrl": f"{url}/commit/{new}", "pullRequestUrl": f"{url}/discussions/{number}"}


def resolve(h: Handler, repo_id: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
    """Serve a file in place."""
    head, data = h.hub.repo(repo_id).head(revision), h.hub.files(repo_id, revision).get(path)
    if data is None:
        raise Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": head})
    return data, {"X-Repo-Commit": head, "ETag": f'"{oid(path, data)}"', "X-Linked-Size": str(len(data))}


ID, REVISION = r"([^/]+/[^/]+)", r"((?:refs/[a-z]+/)?[^/]+)"
ROUTES: list[tuple[str, Callable[..., Any]]] = [
    (r"POST /api/repos/create", create),
    (r"POST /api/validate-yaml", validate),
    (r"GET /api/whoami-v2", lambda h: {"type": "user", "name": "me", "orgs": []}),
    (rf"GET /api/(?:models|datasets)/{ID}(?:/revision/{REVISION})?", info),
    (rf"GET /api/(?:models|datasets)/{ID}/tree/{REVISION}", lambda h, *where: listing(h.hub.files(*where))),
    (rf"POST /api/models/{ID}/preupload/{REVISION}", preupload),
    (rf"POST /api/models/{ID}/commit/{REVISION}", commit),
    (rf"POST /{ID}\.git/info/lfs/objects/batch", batch),
    (r"PUT /_lfs/([0-9a-f]{64}(?:/\d+)?)", put),
    (r"POST /_lfs/([0-9a-f]{64})(/verify)?", finish),
    (rf"(?:GET|HEAD) (?:/datasets)?/{ID}/resolve/{REVISION}/(.+)", resolve),
]


def environment(endpoint: str, cache: Path) -> dict[str, str]:
    """What a child process needs in its environment to take ``endpoint`` for the Hub."""
    return {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache)}


def point_client_at(endpoint: str, monkeypatch: Any, cache: Path) -> None:
    """Make the imported huggingface_hub take ``endpoint`` for the Hub, until the test ends.

    It copies HF_ENDPOINT into these constants while it is imported, and reads them (not the environment) on each call.
    """
    from huggingface_hub import close_session, constants

    close_session()
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    new = {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
    new |= {"HF_HUB_CACHE": str(cache), "HF_TOKEN_PATH": str(cache / "token"), "HF_HUB_DISABLE_PROGRESS_BARS": True}
    for name, value in new.items():
        monkeypatch.setattr(constants, name, value)
