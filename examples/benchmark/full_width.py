"""How long a whole sanitize of a ResNet-18 takes in its full width, on the cores of this machine.

Nobody trains such a network on two cores in an hour. The starter models of the shared folder have half of the width;
every filter is doubled and whoever reads it reads both halves, so that the function stays what it was, backdoor
included. A little noise then makes twins differ. One 1 × 1 convolution is left over that a ResNet-18 does not have.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from starters import ARCH, MODELS, draw_clean, unpacked, write_trigger
from torch import Tensor, nn

from bshub.benchmark.draws import batches
from bshub.benchmark.grid import Victim, load_tests
from bshub.device import processors
from bshub.evaluation.attacks.trigger import load_trigger
from bshub.evaluation.metrics import evaluate_models
from bshub.intake.folders import open_folder
from bshub.intake.models import load_model
from bshub.pipeline import sanitize
from bshub.settings import Settings

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
NOISE = 0.02  # of each weight
TEST_IMAGES = 1000
STEM = "conv1", "bn1"  # as wide as ever in the half-width network
READS_STEM = "layer1.0.conv1", "layer1.0.downsample.0"


def doubled(model: nn.Module, noise: float = NOISE) -> nn.Module:
    """A ResNet with twice the filters, the stem's aside, that computes the same.

    Args:
        model: timm's, in evaluation mode; not changed.
        noise: Relative deviation of each convolution's weights; 0: the function is the very same.
    """
    wide = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for name, module in wide.named_modules():
        if name in STEM:
            continue
        if isinstance(module, nn.Conv2d):
            weight = module.weight.data.repeat_interleave(2, 0)
            if name not in READS_STEM:
                weight = _read_twice(weight)
            weight = weight * (1 + noise * torch.randn(weight.shape, generator=generator))
            module.weight = nn.Parameter(weight)
            module.out_channels, module.in_channels = weight.shape[:2]
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features *= 2
            for key in ("weight", "bias"):
                setattr(module, key, nn.Parameter(getattr(module, key).data.repeat_interleave(2)))
            for key in ("running_mean", "running_var"):
                setattr(module, key, getattr(module, key).repeat_interleave(2))
        elif isinstance(module, nn.Linear):
            module.weight = nn.Parameter(_read_twice(module.weight.data))
            module.in_features *= 2
    return wide


def _read_twice(weight: Tensor) -> Tensor:
    """Half of each weight for either of two equal inputs."""
    return weight.repeat_interleave(2, 1) / 2


def full_width_rows() -> list[dict[str, Any]]:
    """Wall seconds of a whole ``sanitize`` with ten images per class, by step, and what it did to both rates.

    Returns:
        A row a starter model; none where the shared folder is not beside this repository.
    """
    if not SHARED.is_dir():
        return []
    threads, cores = torch.get_num_threads(), processors()
    torch.set_num_threads(cores)
    try:
        with unpacked(SHARED) as work:
            clean = draw_clean(work / "train", work, 0)
            return [{"model": model, "threads": cores, **_row(model, work, clean)} for model in MODELS]
    finally:
        torch.set_num_threads(threads)


def _row(name: str, work: Path, clean: Path) -> dict[str, Any]:
    source = load_model(str(SHARED / "zoo" / f"{name}.safetensors"), arch=ARCH)
    model = doubled(source.module)
    folder, test = (open_folder(root, source.origin.num_classes, source.labels) for root in (clean, work / "test"))
    images = batches(list(zip(folder.paths, folder.labels, strict=True)), source.preprocessing, 32)
    start = time.perf_counter()
    result = sanitize(model, images, Settings(device="cpu"))
    seconds = time.perf_counter() - start
    record = json.loads((SHARED / "zoo" / f"{name}.json").read_text())
    trigger = load_trigger(write_trigger(record, SHARED / "zoo", work))
    chosen = list(range(0, len(test), len(test) // TEST_IMAGES))
    tests = load_tests(test, chosen, Victim(name, source, record, trigger, weights=""))
    shown = zip(*(tensor.split(100) for tensor in tests if tensor is not None), strict=True)
    before, after = evaluate_models([model, result.model], [(x, y, stamped) for x, y, stamped in shown], trigger.target)
    return {
        "seconds": seconds,
        "parts": {part: round(value, 2) for part, value in result.report["seconds"].items()},
        "parameters": result.report["parameters"],
        "repair": result.report["repair"],
        "before": before.as_dict(),
        "after": after.as_dict(),
    }
