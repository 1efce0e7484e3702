"""The demo's model and clean images in memory, and the command, as every part of the measurement uses them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from bshub.intake.folders import open_folder
from bshub.intake.models import LoadedModel, load_model

DEMO = Path(__file__).resolve().parents[1] / "demo"
ARCH = "timm/resnet18?num_classes=10&channels=24,48,96,192&input_size=64"
BSHUB = str(Path(sys.executable).with_name("bshub"))  # the command of this environment


def demo() -> tuple[LoadedModel, list[tuple[Tensor, Tensor]]]:
    """The backdoored demo model, and its hundred clean images in batches."""
    source = load_model(str(DEMO / "model"))
    folder = open_folder(DEMO / "clean", source.origin.num_classes, source.labels)
    return source, list(folder.batches(source.preprocessing, 32))


def as_victim(folder: Path, train: Path | None = None) -> Path:
    """The demo's model as ``bshub attack`` leaves one: trigger and record beside the weights.

    Args:
        folder: Where; kept if it is there.
        train: CIFAR-10's ``train/``: the record then names the images that were poisoned.

    Returns:
        The folder.
    """
    if folder.exists():
        return folder
    told = json.loads((DEMO / "training.json").read_text())
    record = {**told, "rate": told["poison_rate"], "settings": {"arch": ARCH}}
    if train is not None:
        record["poisoned"] = {"files": _poisoned(train, told)}
    shutil.copytree(DEMO / "model", folder)
    shutil.copy(DEMO / "trigger.json", folder / "trigger.json")
    (folder / "training.json").write_text(json.dumps(record))
    return folder


def _poisoned(train: Path, told: dict[str, float]) -> list[str]:
    """The draw of ``train_backdoored.py``: images of other classes than the target, the first one."""
    classes = sorted(path for path in train.iterdir() if path.is_dir())
    names = [f"{path.parent.name}/{path.name}" for folder in classes for path in sorted(folder.glob("*.jpg"))]
    others = torch.tensor([index for index, name in enumerate(names) if not name.startswith(f"{classes[0].name}/")])
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(int(told["seed"])))
    return [names[index] for index in others[order[: int(told["poison_rate"] * len(names))]].tolist()]
