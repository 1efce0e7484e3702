"""26 to 36: images."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import EpsImagePlugin, Image

from bad.bench import Bench, Case, Outcome
from bshub.errors import ImageDataError
from bshub.intake.images import read_image


def noise(size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing of it."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def becomes(data: Callable[[], bytes], pixel: list[int], converted: str) -> Callable[[Bench], Outcome]:
    """The image's first pixel, and what the report counts as converted."""

    def run(bench: Bench) -> Outcome:
        path = bench.put("x.png", data())
        assert read_image(path)[:, 0, 0].tolist() == pixel
        (bench.clean / "cat" / "x.png").write_bytes(data())
        outcome = bench.command("evaluate", bench.model, "--test-dir", bench.clean, "--json")
        assert json.loads(outcome.text)["images"]["converted"] == ({converted: 1} if converted else {})
        return outcome

    return run


def refused(data: Callable[[], bytes]) -> Callable[[Bench], Outcome]:
    """Three of them beside nine good ones are over the quota."""

    def run(bench: Bench) -> Outcome:
        for k in range(3):
            (bench.clean / "cat" / f"bad{k}.jpg").write_bytes(data())
        return bench.sanitize()

    return run


def truncated_jpeg() -> bytes:
    data = encoded(noise(), "JPEG")[:-400]
    Image.open(io.BytesIO(data)).verify()  # which is what libraries call a check
    return data


def palette() -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return encoded(image, "PNG", transparency=1)


def oriented() -> bytes:
    image, exif = Image.new("RGB", (4, 8), (9, 9, 9)), Image.Exif()
    image.paste((200, 0, 0), (0, 7, 4, 8))  # the last row, which orientation 6 makes the first column
    exif[0x0112] = 6
    return encoded(image, "PNG", exif=exif)


def eps(bench: Bench) -> Outcome:
    called: list[object] = []
    bench.monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: called.append(a))
    outcome = refused(lambda: encoded(noise(), "EPS"))(bench)
    assert called == []
    return outcome


def listed(bench: Bench) -> Outcome:
    (bench.clean / "cat" / "empty.jpg").write_bytes(b"")
    outcome = bench.command("evaluate", bench.model, "--test-dir", bench.clean, "--json")
    report = json.loads(outcome.text)
    assert list(report["images"]["unreadable"]) == ["empty.jpg"]
    assert report["evaluation"]["accuracy"]["n"] == 9
    return outcome


def grey(value: int) -> bytes:
    return encoded(Image.fromarray(np.full((4, 4), value, np.uint16)), "PNG")


def float_tiff(value: float = 0.5) -> bytes:
    return encoded(Image.fromarray(np.full((4, 4), value, np.float32)), "TIFF")


def animated(kind: str) -> bytes:
    return encoded(noise(), kind, save_all=True, append_images=[Image.new("RGB", (64, 48))])


def cmyk() -> bytes:
    return encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")


def clear() -> bytes:
    return encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")


def html() -> bytes:
    return b"<!DOCTYPE html><html>404</html>"


REFUSED = ImageDataError
CASES = [
    Case(26, "16-bit grey", becomes(lambda: grey(127 * 257), [127] * 3, "16-bit grey"), says="accuracy", silent=True),
    Case(27, "float TIFF", refused(float_tiff), REFUSED, "floating-point pixels", 2, silent=True),
    Case(27, "float TIFF of zeros", refused(lambda: float_tiff(0)), REFUSED, "floating-point pixels", 2, silent=True),
    Case(28, "CMYK", becomes(cmyk, [255, 0, 0], "CMYK"), says="accuracy"),
    Case(29, "RGBA", becomes(clear, [255] * 3, "transparency"), says="accuracy", silent=True),
    Case(30, "palette transparency", becomes(palette, [255] * 3, "transparency"), says="accuracy"),
    Case(31, "animated PNG", refused(lambda: animated("PNG")), REFUSED, "is animated", 2, silent=True),
    Case(31, "animated WebP", refused(lambda: animated("WEBP")), REFUSED, "is animated", 2, silent=True),
    Case(32, "truncated JPEG", refused(truncated_jpeg), REFUSED, "image file is truncated", 2),
    Case(33, "144 megapixels", refused(lambda: png_header(12_000, 12_000)), REFUSED, "more than 100 megapixels", 2),
    Case(33, "400 megapixels", refused(lambda: png_header(20_000, 20_000)), REFUSED, "more than 100 megapixels", 2),
    Case(33, "a thread of pixels", refused(lambda: png_header(1, 60_000)), REFUSED, "100 times the other", 2),
    Case(34, "EPS", eps, REFUSED, "cannot identify image file", 2),
    Case(35, "EXIF orientation", becomes(oriented, [200, 0, 0], "EXIF orientation"), says="accuracy"),
    Case(36, "HTML called .jpg", refused(html), REFUSED, "cannot identify image file", 2),
    Case(36, "zero bytes, three of twelve", refused(lambda: b""), REFUSED, "2 images under", 2),
    Case(36, "zero bytes, one of ten", listed, says="empty.jpg"),
]
