"""What a search for triggers looks at: batches of clean images, augmented, in one reproducible order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bshub.augment import augment
from bshub.scoring.inversion import InvertedTrigger

BATCH = 16  # images per step


class Feed:
    """Batches of augmented clean images for one trigger after the other, each class's own images left out.

    Args:
        model: In evaluation mode.
        images: Clean, normalised, ``[n, c, h, w]``.
        labels: ``[n]``.
        seed: Of the order and the augmentation.
        progress: Called with the number of steps done.
        half: Whether to compute in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        seed: int,
        progress: Callable[[int], None],
        half: bool = False,
    ) -> None:
        self.model, self.images, self._labels, self.progress, self.half = model, images, labels, progress, half
        self._generator = torch.Generator().manual_seed(seed)
        self._indices: dict[int | None, Tensor] = {}

    def others(self, target: int) -> int:
        """How many images are not of that class; without any, nothing can be led to it."""
        return int((self._labels != target).sum())

    def batch(self, target: int | None, size: int = BATCH) -> Tensor:
        """Up to ``size`` images that are not of ``target``."""
        if target not in self._indices:
            self._indices[target] = (self._labels.cpu() != (-1 if target is None else target)).nonzero()[:, 0]
        others = self._indices[target]
        chosen = others[torch.randperm(len(others), generator=self._generator)[:size]]
        return augment(self.images[chosen.to(self.images.device)], self._generator)

    def step(self, trigger: InvertedTrigger) -> None:
        """One step of one trigger on a fresh batch."""
        trigger.sharpen(self.model, self.batch(trigger.target), self.half)
        self.progress(1)
