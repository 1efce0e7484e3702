"""Draws of clean images: seeded, nested, never poisoned, never from the split that is measured on."""

from __future__ import annotations

import random
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from bshub.errors import UsageError
from bshub.intake.folders import ClassFolder
from bshub.intake.images import read_image
from bshub.intake.preprocessing import Preprocessing


def draw(
    folder: ClassFolder, per_class: int, seed: int, avoid: Collection[str], reserve: Collection[tuple[Path, int]] = ()
) -> list[tuple[Path, int]]:
    """``per_class`` images of every class.

    The draw of one seed is nested: the first image of ten is the image of one, so that more images are more
    information and not another sample.

    Args:
        folder: The training split.
        per_class: How many.
        seed: Of the draw.
        avoid: ``class/file`` of images that carry a trigger or another label in the training.
        reserve: Images that nothing is measured on, for classes that an attack poisoned to the last image, as those
            that keep the labels do to their target at 10 %.

    Returns:
        Paths with labels, class by class.

    Raises:
        UsageError: A class has too few.
    """
    by_class: dict[int, list[Path]] = {}
    for path, label in zip(folder.paths, folder.labels, strict=True):
        by_class.setdefault(label, []).append(path)
    spare: dict[int, list[Path]] = {}
    for path, label in sorted(reserve):
        spare.setdefault(label, []).append(path)
    chosen = []
    for label, paths in sorted(by_class.items()):
        order = sorted(paths)
        random.Random(f"{seed}/{label}").shuffle(order)
        clean = [path for path in order if path.relative_to(folder.root).as_posix() not in avoid]
        if len(clean) < per_class:
            random.Random(f"{seed}/{label}").shuffle(spare.setdefault(label, []))
            clean += spare[label]
        clean = clean[:per_class]
        if len(clean) < per_class:
            raise UsageError(
                f"class {label} of {folder.root} has {len(clean)} clean images, {per_class} are asked for",
                hint=f"ask for fewer: --per-class {len(clean)}",
            )
        chosen += [(path, label) for path in clean]
    return chosen


def batches(chosen: list[tuple[Path, int]], preprocessing: Preprocessing, size: int) -> list[tuple[Tensor, Tensor]]:
    """The drawn images as the model expects them, shuffled so that a batch mixes classes."""
    mixed = list(chosen)
    random.Random(len(mixed)).shuffle(mixed)
    images = torch.stack([preprocessing(read_image(path)) for path, _ in mixed])
    labels = torch.tensor([label for _, label in mixed])
    return list(zip(images.split(size), labels.split(size), strict=True))
