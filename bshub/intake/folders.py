"""A folder of class folders → which image has which label of the model."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bshub.errors import ImageDataError, InconclusiveError, printable
from bshub.intake.images import SUFFIXES, read_image

QUOTA = 0.1  # share of unreadable images above which a folder is refused


@dataclass
class ClassFolder:
    """Images with the model's label of each.

    Attributes:
        root: The folder.
        paths: Images, sorted within their class.
        labels: Index of the model's output for each image.
        matched: How folder names became labels, in words.
        rejected: Unreadable images met so far, with the reason.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    matched: str
    rejected: dict[Path, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self) -> Iterator[tuple[Tensor, int]]:
        """Decode image after image, ``(uint8 [3, h, w], label)``; unreadable ones are set aside.

        Raises:
            ImageDataError: More than a tenth of the images (and more than one) cannot be read.
            InconclusiveError: None can.
        """
        for path, label in zip(self.paths, self.labels, strict=True):
            try:
                image = read_image(path)
            except ImageDataError as error:
                self.rejected[path] = error.message
                if len(self.rejected) > max(1, QUOTA * len(self.paths)):
                    raise ImageDataError(
                        f"{len(self.rejected)} images under {self.root} cannot be read, the last: {error.message}",
                        hint="remove the broken files",
                    ) from None
                continue
            yield image, label
        if len(self.rejected) == len(self.paths):
            raise InconclusiveError(f"no image under {self.root} can be read", hint="check the folder's files")

    def batches(self, transform: Callable[[Tensor], Tensor], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``(images [n, 3, h, w] float, labels [n])`` in folder order, ``transform`` applied to each image."""
        images: list[Tensor] = []
        labels: list[int] = []
        for image, label in self.read():
            images.append(transform(image))
            labels.append(label)
            if len(images) == batch_size:
                yield torch.stack(images), torch.tensor(labels)
                images, labels = [], []
        if images:
            yield torch.stack(images), torch.tensor(labels)


def open_folder(root: str | Path, num_classes: int, label_names: Sequence[str] | None) -> ClassFolder:
    """List the images of ``root/<class>/`` and match the class folders to the model's labels.

    Folder names are matched to ``label_names`` where the model has them (a subset will do), else read as
    indices where all are numbers, else taken in alphabetical order where there are as many as classes.

    Args:
        root: The folder.
        num_classes: Number of outputs of the model.
        label_names: Name of each output, if known.

    Returns:
        The folder's images, at least one.

    Raises:
        ImageDataError: Missing, empty, or the classes cannot be matched.
    """
    root = Path(root)
    if not root.exists():
        raise ImageDataError(f"no folder at {root}", hint="check the path")
    if not root.is_dir():
        raise ImageDataError(f"{root} is not a folder", hint="give the folder that holds the class folders")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.is_symlink() and not _ignored(p.name))
    if not folders:
        loose = any(p.suffix.lower() in SUFFIXES for p in root.iterdir())
        raise ImageDataError(
            f"{root} holds {'images but ' if loose else ''}no class folders",
            hint="put the images into one folder per class: DIR/<class>/<image>",
        )
    _refuse_twins(folders)
    indices, matched = _match([p.name for p in folders], num_classes, label_names)
    paths: list[Path] = []
    labels: list[int] = []
    real_root = root.resolve()
    for folder, index in zip(folders, indices, strict=True):
        inside = [p for p in sorted(folder.rglob("*")) if not any(map(_ignored, p.relative_to(root).parts))]
        images = [p for p in inside if _is_image(p, real_root)]
        paths += images
        labels += [index] * len(images)
    if not paths:
        raise ImageDataError(
            f"the class folders of {root} hold no images", hint=f"known: {', '.join(sorted(SUFFIXES))}"
        )
    return ClassFolder(root, tuple(paths), tuple(labels), matched)


def _ignored(name: str) -> bool:
    return name.startswith((".", "__"))


def _is_image(path: Path, root: Path) -> bool:
    if path.suffix.lower() not in SUFFIXES:
        return False
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            return False
        return path.is_file()
    except (OSError, RuntimeError):  # a link to itself
        return False


def _refuse_twins(folders: Sequence[Path]) -> None:
    seen: dict[str, str] = {}
    for folder in folders:
        key = _plain(folder.name).casefold()
        if key in seen:
            raise ImageDataError(f"two class folders differ only in spelling: {seen[key]!r} and {folder.name!r}")
        seen[key] = folder.name


def _match(names: list[str], num_classes: int, label_names: Sequence[str] | None) -> tuple[list[int], str]:
    if label_names is not None and len(label_names) == num_classes:
        found = [_find_label(name, label_names) for name in names]
        if all(index is not None for index in found):
            return [index for index in found if index is not None], "folder names matched to the model's labels"
    if all(re.fullmatch(r"\d{1,9}", name) for name in names):
        indices = [int(name) for name in names]
        if len(set(indices)) == len(indices) and max(indices) < num_classes:
            return indices, "folder names read as label indices"
    elif len(names) == num_classes:
        if label_names is None:
            return list(range(num_classes)), "class folders in alphabetical order"
        odd = next(n for n in names if n.casefold() not in {str(label).casefold() for label in label_names})
        raise ImageDataError(
            f"class folder {odd!r} is none of the model's labels ({_some(label_names)})",
            hint="name the folders after the model's labels or their indices",
        )
    raise ImageDataError(
        f"{len(names)} class folders ({_some(names)}) do not fit a model with {num_classes} classes",
        hint="name the folders after the model's labels or their indices, or give one folder per class",
    )


def _find_label(name: str, labels: Sequence[str]) -> int | None:
    """Index of the label of this name: exact, or else the only one that differs in case alone."""
    exact = [i for i, label in enumerate(labels) if _plain(label) == _plain(name)]
    folded = [i for i, label in enumerate(labels) if _plain(label).casefold() == _plain(name).casefold()]
    matches = exact or folded
    return matches[0] if len(matches) == 1 else None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name, 40) for name in names[:3])
    return shown + (", …" if len(names) > 3 else "")
