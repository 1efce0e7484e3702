"""fetch, fetch_url, split_reference: the real client against a Hub on the loopback."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import OpenerDirector

import pytest
from loopback_hub import LoopbackHub, environment, point_client_at

from bshub.errors import ModelReferenceError
from bshub.intake import hub as module
from bshub.intake.hub import fetch, split_reference
from bshub.intake.weights_url import _SameHosts, fetch_url

CANARY = "hf_canaryCANARYcanaryCANARY"
REPO = "timm/tiny"
WEIGHTS = bytes(range(256)) * 500
LOOK_UP = "HEAD /timm/tiny/resolve/"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[LoopbackHub]:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(module, "WAITS", (0.01, 0.01))
    with LoopbackHub() as hub:
        hub.seed(REPO, {"model.safetensors": WEIGHTS, "config.json": b"{}"})
        point_client_at(hub.url, monkeypatch, tmp_path / "cache")
        yield hub
    assert CANARY not in caplog.text


def refused(call: Any, *args: Any) -> ModelReferenceError:
    with pytest.raises(ModelReferenceError) as caught:
        call(*args)
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("timm/resnet18.a1_in1k", ("timm/resnet18.a1_in1k", None)),
        ("user/repo@v1.0", ("user/repo", "v1.0")),
        ("user/repo@refs/pr/3", ("user/repo", "refs/pr/3")),
        ("user/repo@" + "a" * 40, ("user/repo", "a" * 40)),
    ],
)
def test_splits_a_reference(reference: str, parts: tuple[str, str | None]) -> None:
    assert split_reference(reference) == parts


@pytest.mark.parametrize(
    "reference",
    ["", "repo", "a\\..\\x", "../x", "user/repo@", "user/repo@a b", "user/repo@../x", "user/repo@-x", "u/r@x\x1b[2J"]
    + ["user/repo@a@b", "a/b/c", "user/repo\n", "user/repo@x.", "user/" + "x" * 200],
)
def test_refuses_a_malformed_reference(reference: str) -> None:
    assert "\x1b" not in str(refused(split_reference, reference))


def test_fetches_the_same_bytes(hub: LoopbackHub) -> None:
    head = hub.repos[REPO].refs["main"]
    assert fetch(REPO, "model.safetensors").read_bytes() == WEIGHTS
    assert fetch(REPO, "config.json", head).read_bytes() == b"{}"
    assert f"Bearer {CANARY}" in hub.authorizations
    asked = len(hub.requests)
    fetch(REPO, "model.safetensors", head)
    assert len(hub.requests) == asked  # a commit never changes, so a cached file needs no look-up


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "", "run `hf auth login`"),
        (401, "GatedRepo", "accept its terms at http"),
        (403, "GatedRepo", "accept its terms at http"),
        (403, "", "hf auth whoami"),
        (404, "RepoNotFound", "check the spelling"),
        (404, "RevisionNotFound", "no revision main"),
        (404, "EntryNotFound", "holds no model.safetensors at revision main"),
        (418, "", "the Hub answered 418"),
        (500, "", "the Hub failed (500)"),
    ],
)
def test_each_refusal_has_its_remedy(hub: LoopbackHub, status: int, code: str, says: str) -> None:
    hub.fail(LOOK_UP, status, times=9, code=code, headers={"X-Error-Message": f"you sent {CANARY}"})
    assert says in str(refused(fetch, REPO, "model.safetensors"))
    assert len(hub.requests) == (3 if status == 500 else 1)


def test_what_is_not_there(hub: LoopbackHub) -> None:
    assert "not on the Hub" in str(refused(fetch, "no/body", "config.json"))
    assert "holds no nothing.bin" in str(refused(fetch, REPO, "nothing.bin"))
    assert "no revision v9" in str(refused(fetch, REPO, "config.json", "v9"))
    asked = len(hub.requests)
    for repo_id, filename in ((REPO, "../x"), (REPO, "a/../../x"), (REPO, ""), (REPO, "/etc/x"), (f"{REPO}@v1", "x")):
        refused(fetch, repo_id, filename)
    assert len(hub.requests) == asked


@pytest.mark.parametrize("status", [429, 503, 0])
def test_a_passing_fault_is_waited_out(hub: LoopbackHub, status: int) -> None:
    hub.fail(LOOK_UP, status, times=2)
    assert fetch(REPO, "model.safetensors").read_bytes() == WEIGHTS


def test_a_download_that_fails(hub: LoopbackHub) -> None:
    hub.fail("GET .*/resolve/", 503)
    assert fetch(REPO, "model.safetensors").read_bytes() == WEIGHTS
    hub.fail("GET .*/resolve/", 503, times=9)
    assert "the Hub failed (503)" in str(refused(fetch, REPO, "config.json"))


def test_a_long_ban_is_not_waited_out(hub: LoopbackHub) -> None:
    hub.fail(LOOK_UP, 429, headers={"RateLimit": '"resolvers";r=0;t=290'})
    assert "asks to wait 290 s" in str(refused(fetch, REPO, "config.json"))


def test_no_network(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point_client_at("http://127.0.0.1:9", monkeypatch, tmp_path / "elsewhere")
    start = time.monotonic()
    text = str(refused(fetch, REPO, "model.safetensors", "v1"))
    assert time.monotonic() - start < 3
    for part in ("no connection to 127.0.0.1", REPO, "revision v1", str(tmp_path / "elsewhere"), "./model.safetensors"):
        assert part in text


def test_no_network_but_cached(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetch(REPO, "model.safetensors")
    point_client_at("http://127.0.0.1:9", monkeypatch, tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        assert fetch(REPO, "model.safetensors").read_bytes() == WEIGHTS
    assert "from the cache" in caplog.text


def test_a_silent_hub_is_given_up(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_UP_SECONDS", 0.1)
    hub.fail(LOOK_UP, 0, times=9, delay=5)
    start = time.monotonic()
    assert "no answer from 127.0.0.1" in str(refused(fetch, REPO, "config.json"))
    assert time.monotonic() - start < 3


def test_offline_mode(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in str(refused(fetch, REPO, "config.json"))


def test_in_a_process_of_its_own(hub: LoopbackHub, tmp_path: Path) -> None:
    """What users do: the endpoint comes from the environment, nothing is patched."""
    code = "import sys; from bshub.intake.hub import fetch; print(fetch(*sys.argv[1:]), end='')"
    child = subprocess.run(
        [sys.executable, "-c", code, REPO, "model.safetensors"],
        env={**os.environ, **environment(hub.url, tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(child.stdout).read_bytes() == WEIGHTS


def test_a_flipped_bit_in_the_cache_is_noticed_where_the_digest_is_known(hub: LoopbackHub) -> None:
    head = hub.repos[REPO].refs["main"]
    path = fetch(REPO, "model.safetensors")
    blob = path.resolve()
    blob.write_bytes(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))
    for revision in (None, head):
        error = refused(fetch, REPO, "model.safetensors", revision)
        assert "model.safetensors in the cache is damaged" in error.message
        assert error.hint == f"delete {blob} and run the command again"
    blob.unlink()
    assert fetch(REPO, "model.safetensors").read_bytes() == WEIGHTS


def test_a_download_that_breaks_off_in_the_middle_is_taken_up_again(hub: LoopbackHub) -> None:
    hub.fail("GET .*/resolve/", 200, cut=True)
    assert fetch(REPO, "model.safetensors").read_bytes() == WEIGHTS


def served(monkeypatch: pytest.MonkeyPatch, data: bytes) -> str:
    """Serve bytes for any address; gives an address that names their digest."""
    monkeypatch.setattr(OpenerDirector, "open", lambda *args, **kwargs: io.BytesIO(data))
    return f"https://download.pytorch.org/models/net-{hashlib.sha256(data).hexdigest()[:8]}.pth"


def test_a_url_is_fetched_whole_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = served(monkeypatch, WEIGHTS)
    path = fetch_url(url, tmp_path / "hub" / "checkpoints")
    assert (path.name, path.read_bytes()) == (url.rpartition("/")[2], WEIGHTS)
    served(monkeypatch, b"not asked for again")
    assert fetch_url(url, path.parent) == path
    path.write_bytes(WEIGHTS[:-1])  # a damaged copy is replaced, not used
    served(monkeypatch, WEIGHTS)
    assert fetch_url(url, path.parent).read_bytes() == WEIGHTS
    assert list(path.parent.iterdir()) == [path]


def test_a_url_with_other_bytes_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = served(monkeypatch, WEIGHTS)
    served(monkeypatch, WEIGHTS[:-1])
    assert "arrived with sha256" in str(refused(fetch_url, url, tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://download.pytorch.org/models/net-00000000.pth",
        "file:///etc/passwd",
        "https://download.pytorch.org.evil.example/net-00000000.pth",
        "https://user@download.pytorch.org/net-00000000.pth",
        "https://download.pytorch.org/models/",
        "https://download.pytorch.org/models/..",
        "https://download.pytorch.org/models/net.pth",
    ],
)
def test_other_urls_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> None:
    served(monkeypatch, WEIGHTS)
    refused(fetch_url, url, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_redirect_leads_nowhere_else() -> None:
    with pytest.raises(ModelReferenceError):
        _SameHosts().redirect_request(None, None, 302, "", None, "https://elsewhere.example/net-00000000.pth")  # type: ignore[arg-type]


def test_a_url_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    text = str(refused(fetch_url, "https://download.pytorch.org/models/net-00000000.pth", tmp_path))
    assert "download.pytorch.org" in text and str(tmp_path) in text and "./model.safetensors" in text
    blocked = tmp_path / "file"
    blocked.touch()
    refused(fetch_url, "https://download.pytorch.org/models/net-00000000.pth", blocked)
