"""What an ONNX file says of itself: class names and preprocessing, so that it can be used without anything else."""

from __future__ import annotations

import math
from typing import Any

from bshub.intake.models import LoadedModel


def onnx_metadata(source: LoadedModel, made: dict[str, Any], *, raw: bool = False) -> dict[str, Any]:
    """The ``metadata_props`` of a file.

    Args:
        source: Labels and preprocessing.
        made: How the file came about, under the key ``bshub``.
        raw: Whether the graph itself prepares ``image``, uint8 ``[batch, height, width, 3]``.

    Returns:
        ``class_names``, ``preprocess`` and ``bshub``; ``preprocess`` is timm's data config plus ``resize``.
    """
    config = source.preprocessing.config
    preprocess = {**config, "resize": list(resized(config)), "in_graph": raw}
    return {"class_names": list(source.labels or ()), "preprocess": preprocess, "bshub": made}


def resized(config: dict[str, Any]) -> tuple[int, int]:
    """``(height, width)`` that an image is resized to before the crop.

    ``floor(input / crop_pct)``, as timm has it. In the crop mode ``center`` the image covers this box and keeps its
    proportions (its shorter side fits where the box is square); in ``squash`` it is pressed into it; in ``border``
    it fits inside.
    """
    _, height, width = config["input_size"]
    share = config.get("crop_pct") or 0.875
    return math.floor(height / share), math.floor(width / share)
