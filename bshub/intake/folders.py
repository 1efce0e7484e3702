"""A folder of images → which image has which label of the model.

Three layouts: class folders, a table (``metadata.py``), and images without labels. Links are followed to files that
lie inside the folder, never to folders; what tools leave behind (hidden names, ``__MACOSX``) is not looked at.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from bshub.errors import ImageDataError, InconclusiveError
from bshub.intake.images import SUFFIXES, read_image
from bshub.intake.labels import match_names, twins
from bshub.intake.metadata import read_metadata

QUOTA = 0.1  # share of unreadable images above which a folder is refused
_SPLITS = frozenset({"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "data"})


@dataclass
class ClassFolder:
    """Images with the model's label of each.

    Attributes:
        root: The folder.
        paths: Images, sorted within their class.
        labels: Index of the model's output for each image.
        matched: The rule that gave the labels, in words.
        empty: Class folders without an image.
        rejected: Unreadable images met so far, with the reason.
        converted: What was converted so far (``CMYK``, ``transparency``, …) → number of images.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    matched: str
    empty: tuple[str, ...] = ()
    rejected: dict[Path, str] = field(default_factory=dict)
    converted: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self) -> Iterator[tuple[Tensor, int]]:
        """Decode image after image, ``(uint8 [3, h, w], label)``; unreadable ones are set aside.

        Raises:
            ImageDataError: More than a tenth of the images (and more than one) cannot be read.
            InconclusiveError: None can.
        """
        self.converted.clear()
        failed = 0
        for path, label in zip(self.paths, self.labels, strict=True):
            try:
                image = read_image(path, self.converted)
            except ImageDataError as error:
                self.rejected[path] = error.message
                failed += 1
                if failed > max(1, QUOTA * len(self.paths)):
                    raise ImageDataError(
                        f"{failed} images under {self.root} cannot be read, the last: {error.message}",
                        hint="remove the broken files",
                    ) from None
                continue
            yield image, label
        if failed == len(self.paths):
            raise InconclusiveError(f"no image under {self.root} can be read", hint="check the folder's files")

    def part(self, of: slice) -> ClassFolder:
        """The same folder with only some of its images; what is unreadable is noted in both."""
        return replace(self, paths=self.paths[of], labels=self.labels[of])

    def mixed(self, count: int) -> ClassFolder:
        """The same images with ``count`` evenly chosen ones first: whoever takes the first ones has all classes."""
        total = len(self)
        if total <= count:
            return self
        first = [index * total // count for index in range(count)]
        chosen = set(first)
        order = [*first, *(index for index in range(total) if index not in chosen)]
        return replace(self, paths=tuple(self.paths[i] for i in order), labels=tuple(self.labels[i] for i in order))

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


def open_folder(
    root: str | Path,
    num_classes: int,
    label_names: Sequence[str] | None,
    *,
    whose: str = "the model's labels",
    within: Path | None = None,
) -> ClassFolder:
    """List the images of a folder and match their classes to the model's labels.

    The classes are those of ``metadata.csv`` or ``metadata.jsonl`` where it states any, else the folders
    ``root/<class>/``; `labels.match_names` says how they become labels.

    Args:
        root: The folder.
        num_classes: Number of outputs of the model.
        label_names: Name of each output, if known.
        whose: Where these names come from, for messages.
        within: The folder that links may lead into; ``root`` itself by default.

    Returns:
        The folder's images, at least one.

    Raises:
        ImageDataError: Missing, empty, or the classes cannot be matched.
    """
    root = _existing(root)
    real_root = (within or root).resolve()
    table = read_metadata(root)
    if table is not None:
        where, told = table
        names = sorted(set(told.values()))
        indices, matched = match_names(names, num_classes, label_names, what=f"labels in {where}", whose=whose)
        index = dict(zip(names, indices, strict=True))
        paths = [root / name for name in sorted(told)]
        outside = next((path for path in paths if not _inside(path, real_root)), None)
        if outside is not None:
            raise ImageDataError(f"{outside} leads out of {root}", hint="put the image itself into the folder")
        labels = [index[told[name]] for name in sorted(told)]
        return ClassFolder(root, tuple(paths), tuple(labels), matched)
    folders = sorted(path for path in _entries(root) if path.is_dir() and not path.is_symlink())
    _refuse_other_layouts(root, folders, label_names or ())
    pair = twins([path.name for path in folders])
    if pair is not None:
        raise ImageDataError(
            f"two class folders differ only in spelling: {pair[0]!r} and {pair[1]!r}", hint="rename or merge them"
        )
    names = [path.name for path in folders]
    indices, matched = match_names(names, num_classes, label_names, what="class folders", whose=whose)
    found = [_images(folder, real_root) for folder in folders]
    if not any(found):
        raise ImageDataError(f"the class folders of {root} hold no images", hint=_known_suffixes())
    return ClassFolder(
        root,
        tuple(path for images in found for path in images),
        tuple(index for index, images in zip(indices, found, strict=True) for _ in images),
        matched,
        empty=tuple(folder.name for folder, images in zip(folders, found, strict=True) if not images),
    )


def open_unlabelled(root: str | Path, *, within: Path | None = None) -> ClassFolder:
    """List the images of a folder at any depth, whatever its folders mean; every label is 0.

    Args:
        root: The folder.
        within: The folder that links may lead into; ``root`` itself by default.

    Raises:
        ImageDataError: Missing, or without images.
    """
    root = _existing(root)
    paths = tuple(_images(root, (within or root).resolve()))
    if not paths:
        raise ImageDataError(f"{root} holds no images", hint=_known_suffixes())
    return ClassFolder(root, paths, (0,) * len(paths), "no labels")


def _existing(root: str | Path) -> Path:
    root = Path(root)
    try:
        if root.is_dir():
            next(root.iterdir(), None)
            return root
        exists = root.exists()
    except OSError as error:
        raise ImageDataError(f"{root} cannot be read: {error.strerror}", hint="check the path and its rights") from None
    if exists:
        raise ImageDataError(f"{root} is not a folder", hint="give the folder that holds the class folders")
    raise ImageDataError(f"no folder at {root}", hint="check the path; a Hub dataset is hf://datasets/user/repo")


def _refuse_other_layouts(root: Path, folders: Sequence[Path], label_names: Sequence[str]) -> None:
    """What is no folder of class folders, told with the way out."""
    if not folders:
        loose = any(_has_suffix(path) for path in _entries(root))
        parquet = any(path.suffix == ".parquet" for path in _entries(root))
        raise ImageDataError(
            f"{root} holds {'images but ' if loose else 'Parquet files and ' if parquet else ''}no class folders",
            hint="put the images into one folder per class, DIR/<class>/<image>, or add --unlabelled to --clean-dir",
        )
    if all(folder.name.casefold() in _SPLITS and folder.name not in label_names for folder in folders):
        splits = [folder.name for folder in folders]
        raise ImageDataError(f"{root} holds splits ({', '.join(splits)}), not classes", hint=f"give {folders[0]}")


def _known_suffixes() -> str:
    return f"known: {', '.join(sorted(SUFFIXES))}"


def _entries(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not _ignored(path.name))


def _images(folder: Path, real_root: Path) -> list[Path]:
    """Images under a folder in order of their paths; folders that are links are not entered."""
    found: list[Path] = []
    try:
        for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=False):
            folders[:] = [name for name in folders if not _ignored(name)]
            found += [Path(parent, name) for name in names if not _ignored(name)]
    except OSError as error:
        raise ImageDataError(f"{error.filename} cannot be read: {error.strerror}", hint="check its rights") from None
    return [path for path in sorted(found) if _has_suffix(path) and _is_image(path, real_root)]


def _raise(error: OSError) -> None:
    raise error


def _ignored(name: str) -> bool:
    return name.startswith((".", "__"))


def _has_suffix(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _inside(path: Path, real_root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(real_root)
    except (OSError, RuntimeError):  # a link to itself
        return False


def _is_image(path: Path, real_root: Path) -> bool:
    try:
        return (not path.is_symlink() or _inside(path, real_root)) and path.is_file()
    except OSError:
        return False
