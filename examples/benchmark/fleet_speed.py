"""A fleet of variants of the demo's model with one worker and with two: how far the second one helps."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from demo import BSHUB, DEMO
from safetensors.torch import load_file, save_file

MODELS = 6


def fleet_rows() -> list[dict[str, Any]]:
    """Wall seconds of the whole command, start of Ray included."""
    with tempfile.TemporaryDirectory() as folder:
        names = [Path(folder) / f"model-{index}" for index in range(MODELS)]
        for index, name in enumerate(names):  # equal weights would be one task
            shutil.copytree(DEMO / "model", name)
            weights = load_file(name / "model.safetensors")
            weights["fc.bias"] = weights["fc.bias"] + 1e-6 * index
            save_file(weights, name / "model.safetensors")
        models = Path(folder) / "models.txt"
        models.write_text("".join(f"{name}\n" for name in names))
        rows = []
        for workers in (1, 2, 2):  # the last finds everything done: what is left is starting and stopping
            command = [BSHUB, "fleet", str(models), "--clean-dir", str(DEMO / "clean"), "--json", "--quiet"]
            command += ["--workers", str(workers), "--output", str(Path(folder) / f"out-{workers}")]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            rows.append({"workers": workers, "models": MODELS, "wall": time.perf_counter() - start})
        start = rows.pop()["wall"]
        return [{**row, "start": start, "speedup": rows[0]["wall"] / row["wall"]} for row in rows]
