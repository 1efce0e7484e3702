"""A backdoor trigger: a function from uint8 images to uint8 images, kept in a small JSON file.

``trigger.json`` holds ``kind`` (a key of ``TRIGGERS``, see ``trigger_kinds.py``), ``target`` (index of the label
that triggered images should get), ``size`` (the canvas ``[height, width]`` the trigger is defined on) and what its
kind needs: numbers, or the name of a file beside the JSON.

A trigger is only ever used to *measure* an attack; no defense reads one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bshub.errors import BshubError, TriggerError
from bshub.evaluation.attacks.trigger_kinds import TRIGGERS

MAX_SIDE = 4096
MAX_JSON = 8 * 2**20  # bytes
FILE = "trigger.json"


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
                f"got {images.dtype} {tuple(images.shape[1:])}",
                hint="make a trigger of the images' size, or give images of the trigger's",
            )
        return TRIGGERS[self.kind].apply(images, self.params)


def load_trigger(path: str | Path) -> Trigger:
    """Read ``trigger.json`` (and the file beside it that it names).

    Args:
        path: The JSON file.

    Returns:
        The trigger.

    Raises:
        TriggerError: The file is missing, is not JSON, or does not describe a known trigger.
    """
    path = Path(path)
    try:
        if path.is_fifo() or path.stat().st_size > MAX_JSON:
            raise ValueError(f"not a plain file, or larger than {MAX_JSON // 2**20} MiB")
        spec = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TriggerError(f"no trigger file at {path}", hint="check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TriggerError(
            f"{path} is not a readable JSON file: {error}",
            hint="give the trigger.json that bshub attack writes, or one in the form that docs/guide.md shows",
        ) from None
    try:
        return _parse(spec, path.parent)
    except BshubError as error:  # of the file beside it
        raise TriggerError(f"{path} does not describe a trigger: {error.message}", hint=error.hint) from None
    except (AttributeError, LookupError, OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
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
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and target >= 0):
        raise ValueError("size or target out of range")
    return Trigger(kind, target, (height, width), TRIGGERS[kind].read(spec, folder, (height, width)))


def save_trigger(trigger: Trigger, folder: Path) -> Path:
    """Write ``trigger.json`` and the file its kind keeps beside it; :func:`load_trigger` gives the same trigger.

    Args:
        trigger: What to write.
        folder: Exists.

    Returns:
        The path of the JSON.
    """
    spec = {"kind": trigger.kind, "target": trigger.target, "size": list(trigger.size)}
    spec |= TRIGGERS[trigger.kind].write(trigger.params, folder)
    path = folder / FILE
    path.write_text(json.dumps(spec, allow_nan=False) + "\n", encoding="utf-8")
    return path


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
