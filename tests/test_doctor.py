"""``bshub doctor``: what is here, what is missing, and never a token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bshub_command
from loopback_hub import LoopbackHub, environment, point_client_at

import bshub.doctor as doctor

CANARY = "hf_" + "canary" * 6


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        point_client_at(server.url, monkeypatch, tmp_path)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield server


def look(*more: str) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Exit code, observations by name, everything that was printed."""
    result = bshub_command("doctor", "--json", *more)
    return result.exit_code, {seen["name"]: seen for seen in json.loads(result.stdout)["checks"]}, result.output


def test_a_sound_place_passes_and_names_what_it_found(hub: LoopbackHub) -> None:
    code, seen, _ = look()
    assert code == 0
    assert torch.__version__.partition("+")[0] in seen["packages"]["text"]
    assert "CPU" in seen["onnxruntime"]["text"]
    assert "GiB free" in seen["cache"]["text"]
    assert hub.url in seen["hub"]["text"]
    assert seen["login"]["state"] == "note"
    assert "extra sign" in seen


def test_a_login_is_named_and_its_token_is_not(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    code, seen, printed = look()
    assert (code, seen["login"]["text"]) == (0, "logged in as me")
    assert f"Bearer {CANARY}" in hub.authorizations
    assert CANARY not in printed + bshub_command("doctor").output


@pytest.mark.parametrize("status", [401, 500])
def test_an_answer_that_repeats_the_token_does_not_get_it_printed(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    hub.fail("whoami", status, times=2, message=f"bad token {CANARY}", code=CANARY)
    code, seen, printed = look("--debug")
    assert CANARY not in printed + bshub_command("doctor").output
    assert code == (1 if status == 401 else 3)
    assert seen["login" if status == 401 else "hub"]["state"] == ("failed" if status == 401 else "unknown")


def test_something_else_at_the_hubs_address_is_told_apart(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopback_hub.ROUTES", [(r"GET /api/whoami-v2", lambda h: (b"<html>Sign in</html>", {}))])
    code, seen, _ = look()
    assert (code, seen["hub"]["state"]) == (3, "unknown")
    assert "not the Hub" in seen["hub"]["text"]


def test_without_a_network_nothing_hangs_and_the_rest_is_still_examined(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", "from bshub_cli.main import app; app()", "doctor", "--json"],
        env={**child_without_hub(), **environment("http://127.0.0.1:9", tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    seen = {it["name"]: it for it in json.loads(child.stdout)["checks"]}
    assert child.returncode == 3, child.stderr
    assert "no connection to 127.0.0.1" in seen["hub"]["text"]
    assert seen["onnxruntime"]["state"] == "ok"


def test_offline_by_choice_asks_nothing_and_passes(tmp_path: Path) -> None:
    with LoopbackHub() as server:
        child = subprocess.run(
            [sys.executable, "-c", "from bshub_cli.main import app; app()", "doctor", "--json"],
            env={**child_without_hub(), **environment(server.url, tmp_path), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert child.returncode == 0, child.stdout
        assert server.requests == []
    assert list(tmp_path.iterdir()) == []


def child_without_hub() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}


def test_what_is_broken_fails_and_says_what_to_do(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        return ["torch>=99", "no-such-package-here>=1", "timm>=1; extra == 'more'"]

    def broken() -> Any:
        raise RuntimeError(f"libcuda\x1b[31m {CANARY}")

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    monkeypatch.setitem(doctor.CHECKS, "onnxruntime", broken)
    code, seen, printed = look()
    assert code == 1
    assert "no-such-package-here is not installed" in seen["packages"]["text"]
    assert "is not >=99" in seen["packages"]["text"]
    assert seen["packages"]["hint"].startswith("pip install")
    assert seen["onnxruntime"]["state"] == "failed"
    assert "\x1b" not in printed
    assert CANARY not in printed


def test_the_table_fits_80_columns(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = bshub_command("doctor")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
