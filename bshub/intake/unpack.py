"""The child process that writes a packed data set as class folders: ``python -m bshub.intake.unpack NAME ROOT OUT``.

torchvision reads CIFAR's files as pickles and may read others so. It does it here, behind the walls of ``confine.py``,
and only what it calls an image and a label gets out: ``OUT/train/<class>/000042.png`` and ``OUT/test/…``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bshub.errors import BshubError, ImageDataError, printable
from bshub.intake.confine import forbid_natively, forbid_python
from bshub.intake.quarantine import limit_process

MAX_IMAGES = 2_000_000
CPU_SECONDS = 1800
MEMORY = 8 << 30
DIGITS_TEST = 360  # scikit-learn keeps the writers' order: the last ones wrote none of the others
_PLAIN = re.compile(r"\w[\w .,'&()+-]{0,60}", re.ASCII)


@dataclass(frozen=True)
class Packed:
    """A data set of torchvision that has a label for every image, and a training and a test split.

    Attributes:
        folder: Where torchvision looks for it below the root.
        train: Arguments of the constructor for the training split.
        test: Those for the test split.
    """

    folder: str
    train: dict[str, Any]
    test: dict[str, Any]


_FLAG: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
_NAMED: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})
DATASETS: dict[str, Packed] = {
    "CIFAR10": Packed("cifar-10-batches-py", *_FLAG),
    "CIFAR100": Packed("cifar-100-python", *_FLAG),
    "GTSRB": Packed("gtsrb", *_NAMED),
    "MNIST": Packed("MNIST/raw", *_FLAG),
    "FashionMNIST": Packed("FashionMNIST/raw", *_FLAG),
    "KMNIST": Packed("KMNIST/raw", *_FLAG),
    "STL10": Packed("stl10_binary", *_NAMED),
}


def main(arguments: list[str]) -> int:
    """Write one data set; on refusal a line of JSON is printed.

    Args:
        arguments: NAME, ROOT and OUT.

    Returns:
        The exit status.
    """
    name, root, out = arguments[0], Path(arguments[1]), Path(arguments[2])
    refused: BshubError
    fetch = f"torchvision.datasets.{name}(root=DIR, download=True) fetches its files"
    try:
        pictures = _digits() if name == "digits" else _torchvision(name, root, out)
        write(pictures, out)
        return 0
    except BshubError as error:
        refused = error
    except MemoryError:
        refused = ImageDataError(f"{name}: its files want more than {MEMORY >> 30} GiB of memory", hint=fetch)
    except Exception as error:
        said = printable(str(error).split("You can use download")[0].strip() or type(error).__name__, 160)
        refused = ImageDataError(f"{name} cannot be read: {said}", hint=fetch)
    print(json.dumps({"message": refused.message, "hint": refused.hint}))
    return 2


def write(pictures: Iterator[tuple[str, str, Any]], out: Path) -> None:
    """Number the images of each split and write them as PNG.

    Args:
        pictures: Split, class and PIL image.
        out: Where ``train/`` and ``test/`` go.

    Raises:
        ImageDataError: There are none of a split, or more than ``MAX_IMAGES``.
    """
    counts = {"train": 0, "test": 0}
    for split, label, image in islice(pictures, MAX_IMAGES + 1):
        folder = out / split / label
        folder.mkdir(parents=True, exist_ok=True)
        image.convert("RGB").save(folder / f"{counts[split]:06d}.png", compress_level=1)
        counts[split] += 1
    empty = [split for split, count in counts.items() if not count]
    if empty or sum(counts.values()) > MAX_IMAGES:
        what = f"more than {MAX_IMAGES} images" if not empty else f"no {empty[0]} images"
        raise ImageDataError(f"the data set holds {what}", hint="fetch its files again")


def folder_names(classes: Any) -> list[str] | None:
    """Names of classes as folder names; None where one could be no such name, or two would fall together."""
    names = [str(name) for name in classes] if isinstance(classes, list | tuple) else []
    plain = all(_PLAIN.fullmatch(name) and not name.endswith((" ", ".")) for name in names)
    return names if names and plain and len({name.casefold() for name in names}) == len(names) else None


def _torchvision(name: str, root: Path, out: Path) -> Iterator[tuple[str, str, Any]]:
    from torchvision import datasets

    of = DATASETS[name]
    limit_process(MEMORY, CPU_SECONDS)
    forbid_natively(out)
    forbid_python(out)
    for split, arguments in (("train", of.train), ("test", of.test)):
        images = getattr(datasets, name)(root=str(root), **arguments)
        names = folder_names(getattr(images, "classes", None)) or []
        for index in range(len(images)):
            image, label = images[index]
            number = int(label)
            yield split, names[number] if 0 <= number < len(names) else f"{number:05d}", image


def _digits() -> Iterator[tuple[str, str, Any]]:
    """scikit-learn's 1,797 digits of 8 by 8 pixels, which lie in its package."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImageDataError("scikit-learn is not installed", hint="pip install scikit-learn") from None
    from PIL import Image

    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype("uint8")
    for index, (pixels, label) in enumerate(zip(grey, digits.target, strict=True)):
        yield "test" if index >= len(grey) - DIGITS_TEST else "train", str(int(label)), Image.fromarray(pixels)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
