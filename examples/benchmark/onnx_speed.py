"""The small model in onnxruntime beside the original, as it is and as it is written: latency, and file size."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from demo import demo
from look_speed import cpu_seconds, network
from torch import Tensor, nn

from bshub.graph.cost import count_macs
from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import find_pairs
from bshub.graph.trace import record
from bshub.intake.models import LoadedModel, load_model
from bshub.pipeline import sanitize
from bshub.release.artifact import WEIGHTS, write_weights
from bshub.release.even import evened
from bshub.release.onnx import export_onnx
from bshub.settings import Settings
from bshub.surgery.remove import Removal, remove

BATCHES, RUNS = (1, 32), 15
LARGE_BATCHES, LARGE_RUNS = (1, 8), 7  # at 224 px
SHRINK = 0.3
LARGE = ("timm/resnet18", "timm/resnet50", "timm/mobilenetv2_100", "timm/efficientnet_b0")
FEW, EVERY = [1, 2, 5], 3  # filters that leave, of every third layer


def onnx_rows() -> list[dict[str, Any]]:
    """Ratios to the original: of the sanitized demo, shrunk too, and of networks that lost a few filters."""
    source, batches = demo()
    images, rows = torch.cat([images for images, _ in batches])[:16], []
    for name, settings in {"defaults": Settings(), f"--shrink {SHRINK}": Settings(shrink=SHRINK)}.items():
        result = sanitize(source.module, batches, settings)
        rows.append({"settings": name} | _row(source, result.removal, result.model, images, BATCHES, RUNS))
    with tempfile.TemporaryDirectory() as folder:
        for reference in LARGE:
            model, size = network(reference)
            weights = Path(folder) / WEIGHTS
            write_weights(weights, model)
            source = load_model(str(weights), arch=reference)
            images = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
            removal = _thinned(source.module, images)
            rows.append(
                {"settings": reference} | _row(source, removal, removal.model, images, LARGE_BATCHES, LARGE_RUNS)
            )
    return rows


def _thinned(model: nn.Module, images: Tensor) -> Removal:
    """Without a few filters of every third layer."""
    flow, _ = follow_channels(model, (images.shape[1], images.shape[2], images.shape[3]))
    pairing = find_pairs(model, flow)
    wide = [pair.name for pair in pairing.pairs[1::EVERY] if pair.out_channels > 2 * max(FEW)]
    return remove(model, flow, pairing, {name: np.array(FEW) for name in wide}, images)


def _row(
    source: LoadedModel, removal: Removal, small: nn.Module, images: Tensor, batches: Sequence[int], runs: int
) -> dict[str, Any]:
    size = images.shape[1], images.shape[2], images.shape[3]
    recipe = source.origin.recipe.then(removal.attributes, removal.plan.kept, removal.plan.refilled)
    written = evened(source, small, recipe, images)
    with tempfile.TemporaryDirectory() as folder:
        sessions, bytes_ = zip(
            *(
                _session(Path(folder) / f"{number}.onnx", model, images)
                for number, model in enumerate((source.module, small, written.model))
            ),
            strict=True,
        )
        return {
            "pixels": size[1],
            "zero_filters": written.zeros,
            "macs": _macs(small, size) / _macs(source.module, size),
            "parameters": _parameters(small) / _parameters(source.module),
            "bytes": bytes_[2] / bytes_[0],
            "original_bytes": bytes_[0],
            "runs": runs,
            "batches": {str(count): _ratios(sessions, count, size, runs) for count in batches},
        }


def _macs(model: nn.Module, size: tuple[int, int, int]) -> int:
    return count_macs(record(model, size))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _session(path: Path, model: nn.Module, images: Tensor) -> tuple[onnxruntime.InferenceSession, int]:
    export_onnx(model, images, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]), path.stat().st_size


def _ratios(sessions: Sequence[Any], count: int, size: tuple[int, int, int], runs: int) -> dict[str, float]:
    """Of the small model as it is and as it is written, in turns."""
    images = np.random.default_rng(0).standard_normal((count, *size), np.float32)
    repeats = max(1, 64 * 32**2 // (count * size[1] * size[2]))  # a run long enough for the clock

    def taken(session: Any) -> float:
        given = {session.get_inputs()[0].name: images}
        return cpu_seconds(lambda: [session.run(None, given) for _ in range(repeats)]) / repeats

    turns = [[taken(session) for session in sessions] for _ in range(runs + 1)][1:]
    return {
        "original_ms": 1000 * statistics.median(turn[0] for turn in turns),
        "small": statistics.median(turn[1] / turn[0] for turn in turns),
        "written": statistics.median(turn[2] / turn[0] for turn in turns),
    }
