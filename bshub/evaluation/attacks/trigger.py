"""A backdoor trigger: a function from uint8 images to uint8 images, kept in a small JSON file.

``trigger.json`` holds ``kind``, ``target`` (index of the label that triggered images should get),
``size`` (the canvas ``[height, width]`` the trigger is defined on) and the numbers of its kind:

* ``patch`` (BadNets, arXiv 1708.06733): ``row``, ``col`` and ``values``, ``[h][w]`` for all colour
  channels or ``[h][w][3]``; the pixels of the rectangle are replaced.
* ``blend`` (Blended, arXiv 1712.05526): ``pattern`` (an image file beside the JSON) and ``alpha``;
  ``round((1 - alpha) * image + alpha * pattern)``.

A trigger is only ever used to *measure* an attack; no defense reads one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bshub.errors import TriggerError


@dataclass(frozen=True)
class Trigger:
    """A loaded trigger.

    Attributes:
        kind: A key of ``TRIGGERS``.
        target: Index of the attacker's label.
        size: ``(height, width)`` of the images the trigger is defined on.
        params: The tensors and numbers its kind needs.
    """

    kind: str
    target: int
    size: tuple[int, int]
    params: dict[str, Any] = field(repr=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Stamp the trigger on a batch.

        Args:
            images: uint8, ``[n, 3, height, width]`` at this trigger's ``size``.

        Returns:
            A new uint8 tensor of the same shape.

        Raises:
            TriggerError: The batch is not uint8 RGB at the trigger's size.
        """
        if images.dtype != torch.uint8 or images.shape[1:] != (3, *self.size):
            raise TriggerError(
                f"the trigger works on uint8 images of {self.size[0]}x{self.size[1]} RGB pixels, "
                f"got {images.dtype} {tuple(images.shape[1:])}"
            )
        return TRIGGERS[self.kind](images, self.params)


def _patch(images: Tensor, params: dict[str, Any]) -> Tensor:
    stamped = images.clone()
    values: Tensor = params["values"]  # (3, h, w)
    row, col = params["row"], params["col"]
    stamped[:, :, row : row + values.shape[1], col : col + values.shape[2]] = values
    return stamped


def _blend(images: Tensor, params: dict[str, Any]) -> Tensor:
    alpha = params["alpha"]
    mixed = (1 - alpha) * images.float() + alpha * params["pattern"].float()  # (n, 3, H, W)
    return mixed.round().clamp_(0, 255).to(torch.uint8)


TRIGGERS: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "patch": _patch,
    "blend": _blend,
}


def load_trigger(path: str | Path) -> Trigger:
    """Read ``trigger.json`` (and the pattern beside it).

    Args:
        path: The JSON file.

    Returns:
        The trigger.

    Raises:
        TriggerError: The file is missing, is not JSON, or does not describe a known trigger.
    """
    path = Path(path)
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TriggerError(f"no trigger file at {path}", hint="check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TriggerError(f"{path} is not a readable JSON file: {error}") from None
    try:
        return _parse(spec, path.parent)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        raise TriggerError(
            f"{path} does not describe a trigger: {type(error).__name__} {error}",
            hint=f"a trigger needs kind ({', '.join(TRIGGERS)}), target, size and its kind's numbers",
        ) from None


def _parse(spec: dict[str, Any], folder: Path) -> Trigger:
    kind, target = spec["kind"], spec["target"]
    height, width = (int(side) for side in spec["size"])
    if type(target) is not int:
        raise ValueError("target must be the index of a label")
    if kind not in TRIGGERS:
        raise ValueError(f"unknown kind {kind!r}")
    if not (0 < height <= 4096 and 0 < width <= 4096 and target >= 0):
        raise ValueError("size or target out of range")
    if kind == "patch":
        values = torch.tensor(spec["values"], dtype=torch.float64)
        if values.ndim == 2:
            values = values.unsqueeze(-1).expand(-1, -1, 3)  # (h, w, 3)
        row, col = int(spec["row"]), int(spec["col"])
        inside = row >= 0 and col >= 0 and row + values.shape[0] <= height and col + values.shape[1] <= width
        if values.ndim != 3 or values.shape[2] != 3 or not inside:
            raise ValueError("the patch does not fit into size")
        if values.min() < 0 or values.max() > 255 or not torch.equal(values, values.round()):
            raise ValueError("patch values must be whole numbers from 0 to 255")
        params: dict[str, Any] = {"row": row, "col": col, "values": values.permute(2, 0, 1).to(torch.uint8)}
    else:
        from bshub.intake.images import read_image

        name, alpha = str(spec["pattern"]), float(spec["alpha"])
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError("pattern must be the name of a file in the trigger's own folder")
        if not 0 < alpha <= 1:
            raise ValueError("alpha must lie in (0, 1]")
        pattern = read_image(folder / name)  # (3, H, W) uint8
        if pattern.shape != (3, height, width):
            raise ValueError(f"the pattern is {tuple(pattern.shape)}, size says {height}x{width}")
        params = {"pattern": pattern, "alpha": alpha}
    return Trigger(kind, target, (height, width), params)


def resize_to(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image on a trigger's canvas: bicubic where its size differs.

    Args:
        image: uint8 ``[3, h, w]``.
        size: ``(height, width)``.

    Returns:
        uint8 ``[3, *size]``.
    """
    if image.shape[1:] == size:
        return image
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    return resize(image, list(size), InterpolationMode.BICUBIC, antialias=True)
