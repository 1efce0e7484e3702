"""The small model in onnxruntime beside the original: latency at batch 1 and 32, and file size."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from demo import demo
from look_speed import cpu_seconds
from torch import nn

from bshub.pipeline import sanitize
from bshub.release.onnx import export_onnx
from bshub.settings import Settings

BATCHES, RUNS = (1, 32), 15
SHRINK = 0.3


def onnx_rows() -> list[dict[str, Any]]:
    """Ratios of the sanitized model, and of one that was made smaller as well, to the original."""
    source, batches = demo()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        before = _session(Path(folder) / "before.onnx", source.module)
        for name, settings in {"defaults": Settings(), f"--shrink {SHRINK}": Settings(shrink=SHRINK)}.items():
            result = sanitize(source.module, batches, settings)
            after = _session(Path(folder) / f"{len(rows)}.onnx", result.model)
            report = result.report
            rows.append({
                "settings": name,
                "macs": report["macs"]["after"] / report["macs"]["before"],
                "parameters": report["parameters"]["after"] / report["parameters"]["before"],
                "bytes": after[1] / before[1],
                "original_bytes": before[1],
                "runs": RUNS,
                **{f"batch_{size}": _ratio(before[0], after[0], size) for size in BATCHES},
            })  # fmt: skip
    return rows


def _session(path: Path, model: nn.Module) -> tuple[onnxruntime.InferenceSession, int]:
    export_onnx(model, torch.randn(4, 3, 32, 32), path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]), path.stat().st_size


def _ratio(before: Any, after: Any, size: int) -> dict[str, float]:
    images = np.random.default_rng(0).standard_normal((size, 3, 32, 32), np.float32)
    repeats = max(1, 64 // size)  # a run long enough for the clock

    def taken(session: Any) -> float:
        given = {session.get_inputs()[0].name: images}
        return cpu_seconds(lambda: [session.run(None, given) for _ in range(repeats)]) / repeats

    turns = [(taken(before), taken(after)) for _ in range(RUNS + 1)][1:]
    return {
        "original_ms": 1000 * statistics.median(a for a, _ in turns),
        "small_ms": 1000 * statistics.median(b for _, b in turns),
        "ratio": statistics.median(b / a for a, b in turns),
    }
