"""From a decoded image to a network's input: always the model's own numbers, never guessed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bshub.errors import ModelReferenceError

KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise as the model was trained with.

    Attributes:
        config: timm's keys: ``input_size (c, h, w)``, ``interpolation``, ``mean``, ``std``, ``crop_pct``,
            ``crop_mode``.
        source: Where the numbers come from, in words.
    """

    config: dict[str, Any]
    source: str
    _transform: Callable[[Any], Tensor] = field(repr=False, compare=False)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """``(channels, height, width)``."""
        channels, height, width = self.config["input_size"]
        return channels, height, width

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 ``(3, h, w)`` → normalised float ``input_size``."""
        from torchvision.transforms.functional import to_pil_image

        return self._transform(to_pil_image(image))


def make_preprocessing(config: dict[str, Any], source: str) -> Preprocessing:
    """Build the transform of a timm data config.

    Args:
        config: At least ``input_size``, ``mean`` and ``std``.
        source: Where it comes from.

    Returns:
        The preprocessing.

    Raises:
        ModelReferenceError: A number is missing or impossible.
    """
    from timm.data import create_transform

    try:
        clean = {key: _plain(config[key]) for key in KEYS if config.get(key) is not None}
        channels, height, width = (int(size) for size in clean["input_size"])
        if channels != 3 or not (0 < height <= 2048 and 0 < width <= 2048):
            raise ValueError(f"input size {clean['input_size']}")
        numbers = [float(value) for value in (*clean["mean"], *clean["std"])]
        if len(clean["mean"]) != 3 or len(clean["std"]) != 3 or not all(map(math.isfinite, numbers)):
            raise ValueError("mean and std need three finite numbers each")
        if min(clean["std"]) <= 0:
            raise ValueError("std must lie above zero")
        if not 0.1 <= float(clean.get("crop_pct", 1.0)) <= 1.0:
            raise ValueError(f"crop_pct {clean['crop_pct']} is outside 0.1 to 1")
        if clean.get("crop_mode", "center") not in ("center", "squash", "border"):
            raise ValueError(f"unknown crop_mode {clean['crop_mode']!r}")
        return Preprocessing(clean, source, create_transform(**clean, is_training=False))
    except (KeyError, TypeError, ValueError, OverflowError, AssertionError) as error:
        raise ModelReferenceError(
            f"the preprocessing from {source} cannot be used: {type(error).__name__} {error}",
            hint="state it in the reference: --arch 'timm/NAME?input_size=32&mean=…&std=…'",
        ) from None


def override(config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A data config with the numbers stated in a reference; a stated input size means no cropping."""
    result = dict(config)
    if "input_size" in given:
        size = given["input_size"]
        result["input_size"] = [3, size, size] if isinstance(size, int) else size
        result["crop_pct"] = 1.0
    for key in ("mean", "std"):
        if key in given:
            value = given[key]
            result[key] = [float(value)] * 3 if isinstance(value, (int, float)) else [float(v) for v in value]
    return result


def torchvision_config(preset: Any) -> dict[str, Any]:
    """timm's keys for the preset of a torchvision weight entry."""
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    return {
        "input_size": [3, crop, crop],
        "interpolation": preset.interpolation.value,
        "mean": list(preset.mean),
        "std": list(preset.std),
        # timm resizes to floor(crop / crop_pct): the small excess keeps the division from falling below `resize`
        "crop_pct": crop / (resize + 1e-6),
        "crop_mode": "center",
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
