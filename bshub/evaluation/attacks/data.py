"""Class folders of training images → uint8 tensors on one canvas: small sets in memory, large ones from disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bshub.errors import BshubError, ImageDataError
from bshub.evaluation.attacks.trigger import resize_to
from bshub.intake.folders import ClassFolder
from bshub.intake.images import read_image
from bshub.progress import Steps

HELD_BYTES = 2 * 2**30
READERS = 4


@dataclass(frozen=True)
class Pictures:
    """Labelled images, each squeezed onto the canvas.

    Attributes:
        root: Their folder.
        paths: Of each image.
        labels: int64 ``[n]``.
        size: The canvas ``(H, W)``.
        held: All of them, uint8 ``[n, 3, H, W]``, where they fit into memory.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: Tensor
    size: tuple[int, int]
    held: Tensor | None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: Tensor) -> Tensor:
        """Images by index, uint8 ``[k, 3, H, W]``.

        Raises:
            ImageDataError: One cannot be read.
        """
        if self.held is not None:
            return self.held[index]
        chosen = [self.paths[i] for i in index.tolist()]
        try:
            with ThreadPoolExecutor(READERS) as pool:
                return torch.stack(list(pool.map(lambda path: resize_to(read_image(path), self.size), chosen)))
        except BshubError as error:
            raise ImageDataError(error.message, hint="remove the broken file, then start anew") from None

    def stream(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """``(indices, images)`` batch by batch; from disk, the next batch is decoded while this one is used."""
        if self.held is not None:
            yield from ((index, self.read(index)) for index in order)
            return
        with ThreadPoolExecutor(1) as ahead:
            waiting: list[tuple[Tensor, Future[Tensor]]] = []
            for index in order:
                waiting.append((index, ahead.submit(self.read, index)))
                if len(waiting) > 1:
                    before, images = waiting.pop(0)
                    yield before, images.result()
            yield from ((index, images.result()) for index, images in waiting)

    def names(self, index: Tensor) -> list[str]:
        """Paths below the root, ``class/file``, by index."""
        return [self.paths[i].relative_to(self.root).as_posix() for i in index.tolist()]

    def digest(self) -> str:
        """Of the files' names and labels: says whether a rerun sees the same images."""
        text = "\n".join(
            f"{path.relative_to(self.root).as_posix()} {label}"
            for path, label in zip(self.paths, self.labels.tolist(), strict=True)
        )
        return hashlib.sha256(f"{self.size} {text}".encode("utf-8", "surrogateescape")).hexdigest()


def open_pictures(
    folder: ClassFolder, size: tuple[int, int], steps: Steps, name: str, held_bytes: int = HELD_BYTES
) -> Pictures:
    """Read a folder into memory, or leave it on disk if it is larger than ``held_bytes``.

    Unreadable images are left out when reading into memory, within the folder's own quota.

    Args:
        folder: The images.
        size: The canvas ``(H, W)``.
        steps: Where the reading is shown.
        name: Of the step.
        held_bytes: Bytes that may be held.
    """
    if len(folder) * 3 * size[0] * size[1] > held_bytes:
        return Pictures(folder.root, folder.paths, torch.tensor(folder.labels), size, None)
    held = torch.empty(len(folder), 3, *size, dtype=torch.uint8)
    labels: list[int] = []
    with steps.step(name, len(folder)) as advance:
        for image, label in folder.read():
            held[len(labels)] = resize_to(image, size)
            labels.append(label)
            advance(1)
    paths = tuple(path for path in folder.paths if path not in folder.rejected)
    return Pictures(folder.root, paths, torch.tensor(labels), size, held[: len(labels)])
