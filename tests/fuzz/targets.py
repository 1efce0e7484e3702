"""What is fuzzed: each function takes any bytes and raises nothing but what breaks the promise."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from bshub.errors import BshubError
from bshub.evaluation.attacks.trigger import load_trigger
from bshub.intake import checkpoint, quarantine
from bshub.intake.datasets import parse_dataset
from bshub.intake.folders import open_folder
from bshub.intake.images import read_image
from bshub.intake.labels import read_classes
from bshub.intake.reference import parse_reference
from bshub.settings import read_settings


def check_checkpoint(data: bytes, folder: Path) -> None:
    """A weights file; pickles are opened by the child's code in this process, where a crash is seen as one."""
    path, converted = folder / "m.pth", folder / "converted.safetensors"
    path.write_bytes(data)
    try:
        if checkpoint.sniff(data[:512], "m.pth") == "safetensors":
            state = checkpoint.read_checkpoint(path)
        else:
            quarantine.convert(path, converted)
            state = checkpoint.read_checkpoint(converted)
    except (BshubError, MemoryError):  # the child's main function makes an error of the latter
        return
    for name, tensor in state.items():
        assert isinstance(name, str)
        assert tensor.is_contiguous()
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all())


def check_pickle(data: bytes, folder: Path) -> None:
    """A pickle inside a sound archive, which chance would not keep sound: checksums lie before it."""
    check_checkpoint(archived(data), folder)


def archived(data: bytes) -> bytes:
    """The archive of ``torch.save`` around a pickle, with sixteen bytes of storage."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), ("data/0", bytes(16)), ("version", b"3\n")):
            archive.writestr(f"m/{name}", content)
    return buffer.getvalue()


def check_image(data: bytes, folder: Path) -> None:
    """An image."""
    path = folder / "x.png"
    path.write_bytes(data)
    try:
        pixels = read_image(path)
    except BshubError:
        return
    assert pixels.dtype == torch.uint8
    assert pixels.ndim == 3 and len(pixels) == 3 and pixels.numel() > 0


def check_text(data: bytes, folder: Path) -> None:
    """A text file of one of the kinds that are read; the first byte says which."""
    read = list(TEXTS.values())[data[0] % len(TEXTS) if data else 0]
    try:
        read(data[1:], folder)
    except BshubError as error:
        assert str(error).isprintable()


def written(folder: Path, name: str, data: bytes) -> Path:
    """A file of these bytes."""
    (folder / name).write_bytes(data)
    return folder / name


def _config(data: bytes, folder: Path) -> Any:
    from bshub.intake.models import load_model

    shutil.copy(_weights(folder), folder / "model.safetensors")
    written(folder, "config.json", data)
    return load_model(str(folder))


def _table(name: str) -> Callable[[bytes, Path], Any]:
    def read(data: bytes, folder: Path) -> Any:
        for other in ("metadata.csv", "metadata.jsonl"):
            (folder / other).unlink(missing_ok=True)
        return open_folder(written(folder, name, data).parent, 3, ("bird", "cat", "dog"))

    return read


TEXTS: dict[str, Callable[[bytes, Path], Any]] = {
    "trigger": lambda data, folder: load_trigger(written(folder, "trigger.json", data)),
    "config": _config,
    "classes": lambda data, folder: read_classes(written(folder, "classes.txt", data)),
    "metadata.csv": _table("metadata.csv"),
    "metadata.jsonl": _table("metadata.jsonl"),
    "settings": lambda data, folder: read_settings(written(folder, "bshub.toml", data)),
    "reference": lambda data, folder: parse_reference(data.decode("utf-8", "surrogateescape")),
    "data set": lambda data, folder: parse_dataset(data.decode("utf-8", "surrogateescape")),
}
TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "checkpoint": check_checkpoint,
    "pickle": check_pickle,
    "image": check_image,
    "text": check_text,
}


@cache
def _network() -> dict[str, torch.Tensor]:
    import timm

    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", num_classes=3).state_dict()


def _weights(folder: Path) -> Path:
    path = folder.parent / "network.safetensors"
    if not path.is_file():
        safetensors.torch.save_file(_network(), path)
    return path


def seeds(name: str) -> list[bytes]:
    """Sound inputs of a target, to start from."""
    return {"checkpoint": _checkpoints, "pickle": _pickles, "image": _images, "text": _texts}[name]()


def _checkpoints() -> list[bytes]:
    state = {"conv.weight": torch.ones(2, 1, 1, 1), "running_var": torch.ones(2), "n": torch.tensor(3)}
    found = [safetensors.torch.save(state), safetensors.torch.save({"m": torch.zeros(0)})]
    for value in (state, {"state_dict": state, "epoch": 1}, {"w": torch.ones(1).expand(9)}):
        for zipped in (True, False):
            torch.save(value, buffer := io.BytesIO(), _use_new_zipfile_serialization=zipped)
            found.append(buffer.getvalue())
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("m/version", b"3\n")
    return [*found, buffer.getvalue(), struct.pack("<Q", 2) + b"{}"]


def _pickles() -> list[bytes]:
    state = {"a.weight": torch.ones(2, 2), "running_var": torch.ones(2)}
    values = [
        state, {"state_dict": state, "epoch": 1}, {"w": torch.ones(1).expand(9)}, {"w": nn.Parameter(torch.ones(3))},
        {"w": torch.ones(3).to(torch.bfloat16)}, {"w": torch.ones(2, dtype=torch.int64)}, {"w": torch.ones(2).bool()},
        {"w": torch.eye(2).to_sparse()}, {"w": torch.ones(2, device="meta")}, [state], {1: 2, "s": {3}, "n": None},
    ]  # fmt: skip
    found = []
    for value in values:
        torch.save(value, buffer := io.BytesIO())
        with zipfile.ZipFile(buffer) as archive:
            found.append(next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")))
    return [*found, b"\x80\x02cbuiltins\nlen\n(VX\ntR."]


def _images() -> list[bytes]:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    found = []
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF"):
        small.save(buffer := io.BytesIO(), kind)
        found.append(buffer.getvalue())
    for mode, kind in (("RGBA", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("F", "TIFF"), ("CMYK", "JPEG"), ("LA", "PNG")):
        other = Image.fromarray(np.full((5, 5), 999, np.uint16)) if mode == "I;16" else small.convert(mode)
        other.save(buffer := io.BytesIO(), kind)
        found.append(buffer.getvalue())
    small.save(buffer := io.BytesIO(), "PNG", save_all=True, append_images=[small])
    return [*found, buffer.getvalue()]


def _texts() -> list[bytes]:
    pretrained = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    recipe = {"format": 1, "stem": None, "attributes": {}, "kept": {"conv_stem.weight": {"0": [0, 7]}}}
    config = {"architecture": "test_efficientnet", "num_classes": 3, "pretrained_cfg": pretrained, "bshub": recipe}
    patch = {"kind": "patch", "target": 0, "size": [8, 8], "row": 1, "col": 1, "values": [[0, 255]]}
    texts = {
        "trigger": json.dumps(patch),
        "config": json.dumps({**config, "label_names": ["a", "b", "c"], "model_args": {"drop_rate": 0.1}}),
        "classes": "bird\ncat\ndog\n",
        "metadata.csv": "file_name,label\na.png,cat\nb/c.png,dog\n",
        "metadata.jsonl": '{"file_name": "a.png", "label": 0}\n',
        "settings": 'mu = "auto"\nbudget = 5.0\nseed = 3\n',
        "reference": "timm/resnet18.a1_in1k?num_classes=10&stem=cifar&mean=0.5,0.4,0.3",
        "data set": "hf://datasets/user/repo@main/train",
    }
    return [bytes([place]) + texts[kind].encode() for place, kind in enumerate(TEXTS)]
