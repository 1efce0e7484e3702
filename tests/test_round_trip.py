"""There and back by every route; six real networks by `make round-trip`, one tiny one here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_a_published_model_answers_the_same_by_every_route(tmp_path: Path, child_environment: dict[str, str]) -> None:
    child_environment.pop("HF_HUB_OFFLINE")
    out = tmp_path / "table.md"
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "round_trip.py", "--models", "timm/test_efficientnet", "--out", out],
        env=child_environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stderr.splitlines()[-1])
    assert row["parameters"]["after"] < row["parameters"]["before"]
    assert row["removed"] >= 0.1 * row["filters"]
    assert set(row["errors"]) == {"bshub", "snippet", "dense", "onnxruntime"}
    assert max(row["errors"].values()) < 1e-5
    assert "\n| timm/test_efficientnet | " in out.read_text(encoding="utf-8")
