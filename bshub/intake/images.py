"""Images on disk → uint8 tensors. The only file that opens an image.

Policy, the same for every command: JPEG, PNG, BMP, WebP, TIFF and PPM are read and nothing else, by content, not by
name; every image is decoded whole (a truncated file is refused); EXIF orientation is applied; transparency is
composited on white; 16-bit grey is rescaled to 8 bits; CMYK and other colour spaces are converted; floating-point and
animated images are refused (of a camera's MPO the first picture is read); an image of more than 100 megapixels, one
a hundred times longer than wide and a file of more than 512 MiB are refused before decoding. What is converted is
counted, and the report says so.
"""

from __future__ import annotations

import stat
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bshub.errors import ImageDataError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
MAX_PIXELS = 100_000_000
MAX_ASPECT = 100  # resizing the shorter side of a thread of pixels would fill the memory
MAX_BYTES = 512 << 20
_ORIENTATION = 0x0112
_SMALLER = "scale it down: networks see a few hundred pixels a side"
_BITS = "save it with 8 or 16 bits a channel"


def read_image(path: Path, converted: Counter[str] | None = None) -> Tensor:
    """Decode one image.

    Args:
        path: A regular file.
        converted: Counts what the policy changed: ``16-bit grey``, ``transparency``, ``CMYK``, ``EXIF orientation``, ….

    Returns:
        uint8 ``(3, height, width)``.

    Raises:
        ImageDataError: Whatever is wrong with the file.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise ImageDataError(f"{path} is not a regular file", hint="give an image file itself")
        if state.st_size > MAX_BYTES:
            raise ImageDataError(
                f"{path} has {state.st_size} bytes, more than {MAX_BYTES >> 20} MiB",
                hint=_SMALLER,
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of corrupt EXIF, and of sizes below Pillow's limit: ours is stricter
            with Image.open(path, formats=FORMATS) as image:
                pixels, changes = _decode(image, path)
    except ImageDataError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, met before the size can be asked for
        raise ImageDataError(
            f"{path} has more than {MAX_PIXELS // 10**6} megapixels",
            hint=_SMALLER,
        ) from None
    except Exception as error:  # Pillow raises many kinds for broken files; all of them mean "not an image"
        reason = str(error).replace(str(path), "the file") or type(error).__name__
        raise ImageDataError(
            f"{path} is not a readable image: {reason}", hint="save it again as PNG or JPEG, or leave it out"
        ) from None
    if converted is not None:
        converted.update(changes)
    return pixels


def _decode(image: Image.Image, path: Path) -> tuple[Tensor, list[str]]:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageDataError(
            f"{path} has {width}x{height} pixels, more than {MAX_PIXELS // 10**6} megapixels",
            hint=_SMALLER,
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageDataError(
            f"{path} has {width}x{height} pixels: one side is over {MAX_ASPECT} times the other",
            hint="crop it, or leave it out",
        )
    changes = []
    if getattr(image, "n_frames", 1) > 1:
        if image.format != "MPO":
            raise ImageDataError(
                f"{path} is animated or has several pages", hint="save one picture of it as PNG or JPEG"
            )
        changes.append("first picture of several (MPO)")
    image.load()
    if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
        changes.append("EXIF orientation")
    image = ImageOps.exif_transpose(image)  # before any conversion, which would drop the orientation
    mode = image.mode
    if mode == "F":
        raise ImageDataError(f"{path} holds floating-point pixels; their range is unknown", hint=_BITS)
    if mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip everything above 255
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ImageDataError(f"{path} holds pixels outside 16 bits", hint=_BITS)
        image = Image.fromarray(np.round(deep / 257).astype(np.uint8))
        changes.append("16-bit grey")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image.alpha_composite(layer)
        if np.asarray(layer)[:, :, 3].min() < 255:
            changes.append("transparency")
    elif image.mode not in ("RGB", "L", "P", "1", "RGBX"):
        changes.append(image.mode)  # CMYK, YCbCr, LAB, HSV
    pixels = np.array(image.convert("RGB"))  # (height, width, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), changes
