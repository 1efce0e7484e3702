"""The demo's model and clean images in memory, as every part of the measurement uses them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from bshub.intake.folders import open_folder
from bshub.intake.models import LoadedModel, load_model

DEMO = Path(__file__).resolve().parents[1] / "demo"


def demo() -> tuple[LoadedModel, list[tuple[Tensor, Tensor]]]:
    """The backdoored demo model, and its hundred clean images in batches."""
    source = load_model(str(DEMO / "model"))
    folder = open_folder(DEMO / "clean", source.origin.num_classes, source.labels)
    return source, list(folder.batches(source.preprocessing, 32))
