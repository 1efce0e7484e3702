"""``TRIGGERS``: what each kind of trigger does to an image, and how it is read from and written to disk.

* ``patch``: ``row``, ``col`` and ``values``, ``[h][w]`` for all colour channels or ``[h][w][3]``; the pixels of the
  rectangle are replaced.
* ``patches``: ``patches``, a list of such rectangles.
* ``blend``: ``pattern`` (an image file beside the JSON) and ``alpha``; ``round((1 - alpha) · x + alpha · pattern)``.
* ``sinusoid``: ``delta`` and ``frequency``; ``round(x + delta · sin(2π · column · frequency / width))``.
* ``warp``: ``grid`` (``[k][k][2]``, the normalised control grid), ``strength`` and ``rescale``; the pixels are moved.
* ``generator``: ``file`` (a safetensors file beside the JSON) and ``channels``; two networks draw a pattern and a
  mask for each image.

Everything is rounded to whole grey levels and clipped to 0…255, as an image file would be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bshub.evaluation.attacks.generator import apply_generator, read_generator, write_generator
from bshub.evaluation.attacks.warp import warp, warp_field

MAX_GRID = 256
MAX_PATCHES = 64
Params = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One kind of trigger.

    Attributes:
        apply: ``(uint8 [n, 3, H, W], params) → uint8`` of the same shape, a new tensor.
        read: ``(spec, folder, (H, W)) → params``; raises plain errors for what does not fit.
        write: ``(params, folder) → spec``; writes the files that the spec names.
    """

    apply: Callable[[Tensor, Params], Tensor]
    read: Callable[[Params, Path, tuple[int, int]], Params]
    write: Callable[[Params, Path], Params]


def _apply_patch(images: Tensor, params: Params) -> Tensor:
    return _apply_patches(images, {"patches": [params]})


def _apply_patches(images: Tensor, params: Params) -> Tensor:
    stamped = images.clone()
    for patch in params["patches"]:
        row, col, values = patch["row"], patch["col"], patch["values"]  # values (3, h, w)
        stamped[:, :, row : row + values.shape[1], col : col + values.shape[2]] = values.to(images.device)
    return stamped


def _read_patch(spec: Params, folder: Path, size: tuple[int, int]) -> Params:
    values = torch.tensor(spec["values"], dtype=torch.float64)
    if values.ndim == 2:
        values = values.unsqueeze(-1).expand(-1, -1, 3)  # (h, w, 3)
    row, col = int(spec["row"]), int(spec["col"])
    inside = row >= 0 and col >= 0 and row + values.shape[0] <= size[0] and col + values.shape[1] <= size[1]
    if values.ndim != 3 or values.shape[2] != 3 or not inside:
        raise ValueError("the patch does not fit into size")
    if values.min() < 0 or values.max() > 255 or not torch.equal(values, values.round()):
        raise ValueError("patch values must be whole numbers from 0 to 255")
    return {"row": row, "col": col, "values": values.permute(2, 0, 1).to(torch.uint8)}


def _read_patches(spec: Params, folder: Path, size: tuple[int, int]) -> Params:
    patches = spec["patches"]
    if not isinstance(patches, list) or not 0 < len(patches) <= MAX_PATCHES:
        raise ValueError(f"patches must be a list of 1 to {MAX_PATCHES} patches")
    return {"patches": [_read_patch(patch, folder, size) for patch in patches]}


def _write_patch(params: Params, folder: Path) -> Params:
    values = params["values"].permute(1, 2, 0).tolist()  # [h][w][3]
    return {"row": params["row"], "col": params["col"], "values": values}


def _write_patches(params: Params, folder: Path) -> Params:
    return {"patches": [_write_patch(patch, folder) for patch in params["patches"]]}


def _apply_blend(images: Tensor, params: Params) -> Tensor:
    alpha = params["alpha"]
    return _whole((1 - alpha) * images.float() + alpha * params["pattern"].to(images.device).float())


def _read_blend(spec: Params, folder: Path, size: tuple[int, int]) -> Params:
    from bshub.intake.images import read_image

    path, alpha = _beside(str(spec["pattern"]), folder, "pattern"), float(spec["alpha"])
    if not 0 < alpha <= 1:
        raise ValueError("alpha must lie in (0, 1]")
    pattern = read_image(path)  # (3, H, W) uint8
    if pattern.shape != (3, *size):
        raise ValueError(f"the pattern is {tuple(pattern.shape)}, size says {size[0]}x{size[1]}")
    return {"pattern": pattern, "alpha": alpha}


def _write_blend(params: Params, folder: Path) -> Params:
    from PIL import Image

    Image.fromarray(params["pattern"].permute(1, 2, 0).cpu().numpy()).save(folder / "pattern.png")
    return {"pattern": "pattern.png", "alpha": params["alpha"]}


def _apply_sinusoid(images: Tensor, params: Params) -> Tensor:
    width = images.shape[3]
    columns = torch.arange(1, width + 1, device=images.device)
    wave = params["delta"] * torch.sin(2 * math.pi * columns * params["frequency"] / width)  # (W)
    return _whole(images.float() + wave)


def _read_sinusoid(spec: Params, folder: Path, size: tuple[int, int]) -> Params:
    delta, frequency = float(spec["delta"]), float(spec["frequency"])
    if not (0 < delta <= 255 and 0 < frequency <= size[1]):
        raise ValueError("delta must lie in (0, 255], frequency in (0, width]")
    return {"delta": delta, "frequency": frequency}


def _apply_warp(images: Tensor, params: Params) -> Tensor:
    field = warp_field(params["grid"], params["strength"], params["rescale"], (images.shape[2], images.shape[3]))
    return _whole(warp(images.float(), field.to(images.device)))


def _read_warp(spec: Params, folder: Path, size: tuple[int, int]) -> Params:
    grid = torch.tensor(spec["grid"], dtype=torch.float32)
    strength, rescale = float(spec["strength"]), float(spec.get("rescale", 1.0))
    if grid.ndim != 3 or grid.shape[0] != grid.shape[1] or grid.shape[2] != 2 or not 2 <= len(grid) <= MAX_GRID:
        raise ValueError(f"grid must be [k][k][2] with k from 2 to {MAX_GRID}")
    if not (bool(torch.isfinite(grid).all()) and abs(strength) <= 1e3 and abs(rescale) <= 10):
        raise ValueError("grid, strength or rescale out of range")
    return {"grid": grid, "strength": strength, "rescale": rescale}


def _write_warp(params: Params, folder: Path) -> Params:
    return {"grid": params["grid"].tolist(), "strength": params["strength"], "rescale": params["rescale"]}


def _read_generator(spec: Params, folder: Path, size: tuple[int, int]) -> Params:
    return read_generator(_beside(str(spec["file"]), folder, "file"), spec["channels"])


def _beside(name: str, folder: Path, what: str) -> Path:
    """A file of the trigger's own folder."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{what} must be the name of a file in the trigger's own folder")
    return folder / name


def _whole(pixels: Tensor) -> Tensor:
    return pixels.round().clamp_(0, 255).to(torch.uint8)


TRIGGERS: dict[str, Kind] = {
    "patch": Kind(_apply_patch, _read_patch, _write_patch),
    "patches": Kind(_apply_patches, _read_patches, _write_patches),
    "blend": Kind(_apply_blend, _read_blend, _write_blend),
    "sinusoid": Kind(_apply_sinusoid, _read_sinusoid, lambda params, folder: dict(params)),
    "warp": Kind(_apply_warp, _read_warp, _write_warp),
    "generator": Kind(apply_generator, _read_generator, write_generator),
}
