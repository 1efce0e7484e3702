"""Images built here, good and bad, through the one door."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bshub.errors import ImageDataError
from bshub.intake import images as module
from bshub.intake.images import FORMATS, read_image

RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10  # 4 rows, 6 columns


def colours(size: tuple[int, int] = (6, 4)) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_lossless_formats_come_out_as_they_went_in(tmp_path: Path, suffix: str) -> None:
    path, image = tmp_path / f"x.{suffix}", colours()
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    read = read_image(path)
    assert (read.dtype.__str__(), tuple(read.shape)) == ("torch.uint8", (3, 4, 6))
    assert np.array_equal(read.permute(1, 2, 0).numpy(), np.asarray(image))
    assert read.is_contiguous()


def test_jpeg_is_close_and_the_content_counts_not_the_name(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), (200, 30, 90))
    image.save(tmp_path / "x.jpg", quality=95)
    (tmp_path / "x.png").write_bytes((tmp_path / "x.jpg").read_bytes())
    read = read_image(tmp_path / "x.png")
    assert np.abs(read.float().mean((1, 2)).numpy() - [200, 30, 90]).max() < 4


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_rescaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    deep = (RAMP.astype(np.uint16)) * 257
    Image.fromarray(deep).save(tmp_path / f"x.{suffix}")
    read = read_image(tmp_path / f"x.{suffix}")
    assert np.array_equal(read.numpy(), np.stack([RAMP] * 3))


def test_sixteen_bit_extremes_and_halves_round(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 127, 128, 255, 256, 32767, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[0, 0].tolist() == [0, 0, 0, 1, 1, 127, 255]


@pytest.mark.parametrize("value", [70000, -1])
def test_integers_outside_sixteen_bits_are_refused(tmp_path: Path, value: int) -> None:
    Image.fromarray(np.full((2, 2), value, np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(ImageDataError, match="outside 16 bits"):
        read_image(tmp_path / "x.tif")


def test_cmyk_is_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.tif")  # no cyan: red
    assert read_image(tmp_path / "x.tif")[:, 0, 0].tolist() == [255, 0, 0]


def transparent(kind: str) -> Image.Image:
    if kind == "RGBA":
        return Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    if kind == "LA":
        return Image.new("LA", (2, 2), (0, 0))
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(tmp_path: Path, kind: str) -> None:
    transparent(kind).save(tmp_path / "x.png", **({"transparency": 1} if kind == "P" else {}))
    assert set(read_image(tmp_path / "x.png").flatten().tolist()) == {255}


def test_half_transparency_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").flatten().tolist() == pytest.approx([255, 127, 127], abs=1)


def test_a_key_colour_of_rgb_is_transparent_too(tmp_path: Path) -> None:
    colours().save(tmp_path / "x.png", transparency=tuple(int(v) for v in np.asarray(colours())[0, 0]))
    assert read_image(tmp_path / "x.png")[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_three_channels(tmp_path: Path, mode: str) -> None:
    Image.fromarray(RAMP).convert(mode).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").shape == (3, 4, 6)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, value: int) -> None:
    # the corner that is red in the upright picture, for each of EXIF's eight orientations
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}[value]
    stored = np.zeros((32, 48, 3), np.uint8)
    rows, columns = (slice(0, 16) if c == 0 else slice(-16, None) for c in corner)
    stored[rows, columns] = (255, 0, 0)
    Image.fromarray(stored).save(tmp_path / f"x.{suffix}", exif=oriented(value))
    read = read_image(tmp_path / f"x.{suffix}")
    assert tuple(read.shape) == ((3, 32, 48) if value < 5 else (3, 48, 32))
    assert int(read[0, 4, 4]) > 200


def test_exif_orientation_is_applied_to_sixteen_bits_as_well(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "x.png", exif=oriented(6))
    assert read_image(tmp_path / "x.png").shape == (3, 6, 4)


def test_what_is_converted_is_counted(tmp_path: Path) -> None:
    kinds = {
        "EXIF orientation": lambda: encoded(colours(), "PNG", exif=oriented(6)),
        "16-bit grey": lambda: encoded(Image.fromarray(np.full((2, 2), 999, np.uint16)), "PNG"),
        "transparency": lambda: encoded(transparent("LA"), "PNG"),
        "CMYK": lambda: encoded(colours().convert("CMYK"), "JPEG"),
    }
    counted: Counter[str] = Counter()
    for make in kinds.values():
        (tmp_path / "x").write_bytes(make())
        read_image(tmp_path / "x", counted)
        read_image(tmp_path / "x")
    assert counted == dict.fromkeys(kinds, 1)
    for make in (lambda: encoded(colours(), "PNG", exif=oriented(1)), lambda: encoded(colours().convert("L"), "JPEG")):
        (tmp_path / "x").write_bytes(make())
        read_image(tmp_path / "x", counted)
    (tmp_path / "x").write_bytes(BAD["truncated jpeg"]())
    with pytest.raises(ImageDataError):
        read_image(tmp_path / "x", counted)
    assert counted == dict.fromkeys(kinds, 1)


def test_of_a_cameras_several_pictures_the_first_is_read(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 0, 250)))
    first.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[second])
    assert Image.open(tmp_path / "x.jpg").n_frames == 2
    counted: Counter[str] = Counter()
    assert read_image(tmp_path / "x.jpg", counted)[0].min() > 200
    assert counted == {"first picture of several (MPO)": 1}


def test_a_hundred_to_one_is_the_limit_of_proportions(tmp_path: Path) -> None:
    Image.new("RGB", (200, 2)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").shape == (3, 2, 200)


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as stream:
        stream.truncate(module.MAX_BYTES + 1)
    with pytest.raises(ImageDataError, match="more than 512 MiB"):
        read_image(tmp_path / "x.png")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing of it."""
    chunks = b""
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


BAD: dict[str, Callable[[], bytes]] = {
    "zero bytes": lambda: b"",
    "html": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "truncated jpeg": lambda: encoded(colours((64, 64)), "JPEG")[:-400],
    "truncated png": lambda: encoded(colours((64, 64)), "PNG")[:-200],
    "float tiff": lambda: encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"),
    "animated gif": lambda: encoded(colours(), "GIF", save_all=True, append_images=[Image.new("RGB", (6, 4))]),
    "still gif": lambda: encoded(colours(), "GIF"),
    "animated png": lambda: encoded(colours(), "PNG", save_all=True, append_images=[Image.new("RGB", (6, 4))]),
    "animated webp": lambda: encoded(colours(), "WEBP", save_all=True, append_images=[Image.new("RGB", (6, 4))]),
    "two pages": lambda: encoded(colours(), "TIFF", save_all=True, append_images=[colours()]),
    "eps": lambda: encoded(colours(), "EPS"),
    "pdf": lambda: encoded(colours(), "PDF"),
    "ico": lambda: encoded(colours((16, 16)), "ICO"),
    "text ppm": lambda: b"P3 2 2 255 1 2 3 4",
    "144 megapixels": lambda: png_header(12000, 12000),
    "400 megapixels": lambda: png_header(20000, 20000),
    "two thousand million": lambda: png_header(2**31 - 1, 2**31 - 1),
    "header alone": lambda: png_header(64, 64),
    "a thread of pixels": lambda: png_header(1, 101),
    "a wide thread of pixels": lambda: png_header(60_000, 2),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_bytes_are_refused_in_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(BAD[what]())
    with pytest.raises(ImageDataError) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    assert caught.value.message.startswith(str(path))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("width", [12000, 13400])
def test_large_images_are_refused_before_decoding(tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(png_header(width, 12000))
    monkeypatch.setattr(Image.Image, "load", lambda *a: pytest.fail("decoded"))
    with pytest.raises(ImageDataError):
        read_image(tmp_path / "x.png")


def test_ghostscript_is_never_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was called"))
    (tmp_path / "x.jpg").write_bytes(BAD["eps"]())
    with pytest.raises(ImageDataError):
        read_image(tmp_path / "x.jpg")
    assert {"EPS", "GIF", "PDF", "MPEG", "FITS"}.isdisjoint(FORMATS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ImageDataError, match="not a regular file"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["missing.png", "folder"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImageDataError):
        read_image(tmp_path / name)


def test_control_characters_of_a_name_are_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2J\n.png"
    path.write_bytes(b"x")
    with pytest.raises(ImageDataError) as caught:
        read_image(path)
    assert caught.value.message.isprintable()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
    st.integers(0, 400),
)
def test_any_bytes_are_an_image_or_one_kind_of_error(
    tmp_path: Path, kind: str, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(encoded(colours((9, 7)), kind))
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path / "x.png"
    path.write_bytes(data[: len(data) - cut % len(data)] if cut % 3 == 0 else data)
    try:
        image = read_image(path)
    except ImageDataError as error:
        assert "\n" not in str(error)
    else:
        assert (image.dtype, image.shape[0], image.ndim) == (module.torch.uint8, 3, 3)
