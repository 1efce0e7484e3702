"""What ``--data`` names → the folders of its training and its test images.

    DIR                           DIR/train/<class>/ and DIR/test/<class>/ or DIR/val/<class>/; Tiny ImageNet as it
                                  is unpacked, whose val/ has a table and whose test/ has no labels
    torchvision/CIFAR100?root=D   a data set that torchvision reads from its files in D
    sklearn/digits                scikit-learn's digits
    hf://datasets/user/repo       a data set on the Hub, of image files in folders

Packed ones are written out once, as class folders in Hugging Face's cache of assets (``HF_ASSETS_CACHE``).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bshub.errors import ImageDataError, OutputError, UsageError, choices
from bshub.intake.child import refusal, run_child
from bshub.intake.datasets import fetch_dataset, is_dataset
from bshub.intake.folders import ClassFolder, open_folder
from bshub.intake.metadata import ANNOTATIONS
from bshub.intake.unpack import DATASETS

SECONDS = 3600
_LAYOUT = "--data DIR holds DIR/train/<class> and DIR/test/<class>"


@dataclass(frozen=True)
class Splits:
    """Where the images of a data set are.

    Attributes:
        train: The folder of the training images.
        test: That of the test images.
        within: Where their links may lead; None: nowhere else.
    """

    train: Path
    test: Path
    within: Path | None = None

    def open(self, split: str, num_classes: int, labels: Sequence[str] | None) -> ClassFolder:
        """The images of ``train`` or ``test``, with the labels of a model.

        Args:
            split: Which.
            num_classes: Number of outputs of the model.
            labels: Name of each, if known.

        Raises:
            ImageDataError: Its classes are not the model's, or it holds no images.
        """
        return open_folder(self.train if split == "train" else self.test, num_classes, labels, within=self.within)


def find_splits(data: Path, test_data: Path | None = None) -> Splits:
    """Find a data set; see the module for how it is named.

    Args:
        data: As typed.
        test_data: Folder of the test images, where they are not beside the training images.

    Raises:
        ImageDataError: A packed data set or one on the Hub cannot be had.
        UsageError: There is no such data set, or it is not split.
        OutputError: There is no room to write a packed one out.
    """
    within = None
    if is_dataset(data):
        data, within = fetch_dataset(str(data))
    elif data.parts[:1] in (("torchvision",), ("sklearn",)) and not data.exists():
        data = _unpacked(data.parts[0], os.sep.join(data.parts[1:]))
    tests = ("val", "test") if (data / "val" / ANNOTATIONS).is_file() else ("test", "val")
    return Splits(_split(data, "train"), test_data or _split(data, *tests), within)


def _split(data: Path, *names: str) -> Path:
    for name in names:
        if (data / name).is_dir():
            return data / name
    raise UsageError(f"{data} has no folder {' or '.join(names)}", hint=_LAYOUT)


def _unpacked(library: str, text: str) -> Path:
    """Class folders of a packed data set, written when they are first asked for."""
    from huggingface_hub import cached_assets_path

    name, _, option = text.partition("?")
    known = ["digits"] if library == "sklearn" else list(DATASETS)
    if name not in known:
        raise UsageError(f"bshub knows no data set {library}/{name}", hint=choices(name, known))
    key, _, value = option.partition("=")
    packed = library == "torchvision"
    if packed != (key == "root" and bool(value)):
        form = f"{library}/{name}?root=DIR" if packed else f"{library}/{name}"
        raise UsageError(f"{library}/{text} does not say where its files are", hint=f"write --data '{form}'")
    root = Path(value).expanduser().resolve()
    target = Path(cached_assets_path("bshub", "datasets", f"{name}-{_state(root, name) if packed else 'own'}"))
    try:
        if not any(target.iterdir()):
            _unpack(name, root, target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}", hint="set HF_ASSETS_CACHE") from None
    return target


def _state(root: Path, name: str) -> str:
    """Which files these are, by place, size and time: others are unpacked anew."""
    folder = root / DATASETS[name].folder
    if not folder.is_dir():
        raise ImageDataError(
            f"no folder {DATASETS[name].folder} in {root}",
            hint=f"torchvision.datasets.{name}(root=DIR, download=True) fetches its files",
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _unpack(name: str, root: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=target.parent, ignore_cleanup_errors=True) as made:
        out = Path(made) / "out"
        out.mkdir()
        try:
            code, verdict = run_child("bshub.intake.unpack", [name, str(root), str(out)], Path(made), SECONDS)
        except subprocess.TimeoutExpired:
            raise ImageDataError(f"{name} was not unpacked within {SECONDS} s", hint="fetch its files again") from None
        if code != 0:
            message, hint = refusal(verdict) or (f"unpacking {name} failed with status {code}", "fetch its files again")
            raise ImageDataError(message, hint=hint)
        if not any(target.iterdir()):  # another process may have been quicker
            os.replace(out, target)
