"""How long the commands take that people and hooks wait for: whole processes."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from demo import BSHUB, DEMO

RUNS = 9


def command_rows() -> list[dict[str, Any]]:
    """``bshub --help`` and ``bshub gate`` on a passing receipt: median milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = str(Path(folder) / "model")
        command = [BSHUB, "sanitize", str(DEMO / "model"), "--clean-dir", str(DEMO / "clean")]
        command += ["--test-dir", str(DEMO / "heldout"), "--trigger", str(DEMO / "trigger.json"), "--output", artifact]
        subprocess.run(command, check=True, capture_output=True)
        size = sum(path.stat().st_size for path in Path(artifact).rglob("*") if path.is_file())
        return [
            {"command": "bshub --help", "limit": 300, **_timed([BSHUB, "--help"])},
            {"command": "bshub gate ARTIFACT", "limit": 500, "bytes": size, **_timed([BSHUB, "gate", artifact])},
        ]


def _timed(command: list[str]) -> dict[str, Any]:
    taken = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True)
        taken.append(1000 * (time.perf_counter() - start))
    return {"median": statistics.median(taken[1:]), "least": min(taken[1:]), "runs": RUNS, "exit": done.returncode}
