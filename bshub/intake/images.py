"""Images on disk → uint8 tensors. The only file that opens an image.

Policy, the same for every command: JPEG, PNG, BMP, WebP, TIFF and PPM are read and nothing else; every image is
decoded whole (a truncated file is refused); EXIF orientation is applied; transparency is composited on white;
16-bit grey is rescaled to 8 bits; CMYK is converted; floating-point and animated images are refused; an image
of more than 100 megapixels is refused before decoding.
"""

from __future__ import annotations

import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bshub.errors import ImageDataError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
MAX_PIXELS = 100_000_000


def read_image(path: Path) -> Tensor:
    """Decode one image.

    Args:
        path: A regular file.

    Returns:
        uint8 ``(3, height, width)``.

    Raises:
        ImageDataError: Whatever is wrong with the file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageDataError(f"{path} is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the cap below is stricter
            with Image.open(path, formats=FORMATS) as image:
                return _decode(image, path)
    except ImageDataError:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files; all of them mean "not an image"
        reason = str(error).replace(str(path), "the file") or type(error).__name__
        raise ImageDataError(f"{path} is not a readable image: {reason}") from None


def _decode(image: Image.Image, path: Path) -> Tensor:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageDataError(f"{path} has {width}x{height} pixels, more than {MAX_PIXELS // 10**6} megapixels")
    if getattr(image, "n_frames", 1) > 1:
        raise ImageDataError(f"{path} is animated or has several pages")
    image.load()
    image = ImageOps.exif_transpose(image)  # before any conversion, which would drop the orientation
    mode = image.mode
    if mode == "F":
        raise ImageDataError(f"{path} holds floating-point pixels; their range is unknown")
    if mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip everything above 255
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ImageDataError(f"{path} holds pixels outside 16 bits")
        image = Image.fromarray(np.round(deep / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image.alpha_composite(layer)
    pixels = np.array(image.convert("RGB"))  # (height, width, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
