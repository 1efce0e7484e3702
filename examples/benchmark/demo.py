"""The demo's model and clean images in memory, and the command, as every part of the measurement uses them."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

from bshub.intake.folders import open_folder
from bshub.intake.models import LoadedModel, load_model

DEMO = Path(__file__).resolve().parents[1] / "demo"
BSHUB = str(Path(sys.executable).with_name("bshub"))  # the command of this environment


def demo() -> tuple[LoadedModel, list[tuple[Tensor, Tensor]]]:
    """The backdoored demo model, and its hundred clean images in batches."""
    source = load_model(str(DEMO / "model"))
    folder = open_folder(DEMO / "clean", source.origin.num_classes, source.labels)
    return source, list(folder.batches(source.preprocessing, 32))
