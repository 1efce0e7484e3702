"""The clean images of a run: streamed once for the statistics, a bounded part kept for everything after."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from bshub.errors import InconclusiveError, UsageError
from bshub.parallel import Workers

MIN_IMAGES = 4
KEPT_IMAGES = 1024
ENOUGH = 32  # to go on without the others


class CleanImages:
    """Clean batches on one device.

    ``stream`` may be iterated once and sees all images; ``images`` and ``labels`` hold the first 1024 of them, so
    the loader should not give one class after the other. Of several processes each streams its own part.

    Args:
        loader: ``(images [n, c, h, w] float, labels [n])``.
        device: Where the batches go.
        total: Number of images to come, where it is known; a DataLoader knows.
        workers: The processes; ``join`` makes the kept images those of all.
        made_up: Whether they are stand-ins, whose labels are the model's own answers.

    Attributes:
        total: Number of images to come to this process, if known.
        made_up: As given.
        count: Number of images seen; after ``join``, by all processes.

    Raises:
        UsageError: The loader does not give such batches.
        InconclusiveError: There are fewer than four images in all, or none for this process.
    """

    def __init__(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        device: torch.device,
        total: int | None = None,
        workers: Workers | None = None,
        made_up: bool = False,
    ) -> None:
        self._device, self.made_up = device, made_up
        self._workers = workers or Workers()
        self.total = total if total is not None else _size(loader)
        self._rest = iter(loader)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._ahead: list[tuple[Tensor, Tensor]] = []
        self._classes: int | None = None
        self.count = 0
        while self.count < MIN_IMAGES and self._advance():
            pass
        (found,) = self._workers.sums([self.count])
        if found < MIN_IMAGES or not self.count:
            raise InconclusiveError(
                f"{self.count} clean images are too few to judge a model", hint="give at least 4, better 10 per class"
            )

    def _advance(self) -> bool:
        try:
            batch = next(self._rest)
        except StopIteration:
            return False
        try:
            images, labels = batch
            images, labels = images.to(self._device), labels.to(self._device)
            images = images.float() if images.is_floating_point() else images
            sound = images.ndim == 4 and images.is_floating_point() and labels.shape == images.shape[:1]
        except (TypeError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise UsageError(
                "the loader must give (images [n, c, h, w] float, labels [n])",
                hint="wrap yours: for images, labels in loader: yield images, labels",
            )
        if self._kept and images.shape[1:] != self._kept[0][0].shape[1:]:
            raise UsageError(
                f"the images differ in size: {tuple(images.shape[1:])} after {self.input_size}",
                hint="resize them to one size in the loader",
            )
        if not bool(torch.isfinite(images).all()):
            raise UsageError(
                "the clean images contain NaN or infinite values", hint="look at the normalisation in the loader"
            )
        self._check(labels)
        if self.count < KEPT_IMAGES:
            self._kept.append((images, labels.long()))
        self._ahead.append((images, labels.long()))
        self.count += len(images)
        return True

    def expect(self, classes: int) -> None:
        """Refuse labels that are no index of the model's ``classes`` outputs, those to come as well.

        Raises:
            UsageError: One is not.
        """
        self._classes = classes
        self._check(self.labels)

    def _check(self, labels: Tensor) -> None:
        if self._classes is not None and len(labels):
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self._classes:
                raise UsageError(
                    f"the labels reach from {low} to {high}, but the model has {self._classes} classes",
                    hint="map the labels to the indices of the model's outputs",
                )

    def stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches, once."""
        while self._ahead or self._advance():
            yield self._ahead.pop(0)

    def drain(self) -> None:
        """Read on until enough images are kept, where nobody streamed."""
        while self.count < KEPT_IMAGES and self._advance():
            self._ahead.clear()

    def join(self) -> None:
        """Give every process the first 1024 images of all, in the order of the processes."""
        if self._workers.size > 1:
            gather, images, labels = self._workers.gather, self.images, self.labels
            counts = torch.cat(gather(torch.tensor([self.count])))
            wanted = max(0, KEPT_IMAGES - int(counts[: self._workers.rank].sum()))
            self._kept = list(zip(gather(images[:wanted]), gather(labels[:wanted]), strict=True))
            self.count = int(counts.sum())

    @property
    def input_size(self) -> tuple[int, int, int]:
        """``(channels, height, width)``."""
        channels, height, width = self._kept[0][0].shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Outputs of the model, as ``expect`` was told them; 0 before."""
        return self._classes or 0

    @property
    def images(self) -> Tensor:
        """The kept images, ``[n, c, h, w]``."""
        return self._joined()[0]

    @property
    def labels(self) -> Tensor:
        """Their labels, ``[n]``."""
        return self._joined()[1]

    def _joined(self) -> tuple[Tensor, Tensor]:
        """The kept batches as one, joined once and not at every look."""
        if len(self._kept) > 1:
            images, labels = (torch.cat(parts)[:KEPT_IMAGES] for parts in zip(*self._kept, strict=True))
            self._kept = [(images, labels)]
        images, labels = self._kept[0]
        return images[:KEPT_IMAGES], labels[:KEPT_IMAGES]

    def leave_out(self, classes: Collection[int]) -> bool:
        """Keep only the images of other classes, if ``ENOUGH`` are left then.

        Args:
            classes: Labels.

        Returns:
            Whether it was done.
        """
        images, labels = self.images, self.labels
        others = ~torch.isin(labels, torch.tensor(list(classes), device=labels.device))
        if int(others.sum()) < ENOUGH:
            return False
        self._kept = [(images[others], labels[others])]
        return True

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """The kept images in batches."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


def _size(loader: object) -> int | None:
    """Number of images of a DataLoader."""
    try:
        return len(loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return None
