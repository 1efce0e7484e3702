"""What every attack takes and gives; ``registry.py`` lists them.

All attacks here are all-to-one: whatever carries the trigger shall become ``target``. The *rate* is the share of the
whole training set that carries it. Dirty-label attacks choose among the images of the other classes and relabel them;
clean-label attacks choose among the target's own images and change no label, so that their rate is capped by the size
of the target class (with ten equal classes, 10 % is all of it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bshub.errors import UsageError
from bshub.evaluation.attacks.trigger import Trigger
from bshub.progress import Steps

CLEAN, POISONED, CROSS = 0, 1, 2

Roles = Callable[[int], Tensor]
Stamp = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
Live = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, "Tensor | float"]]


@dataclass(frozen=True)
class Setup:
    """What an attack may know of the run that it poisons.

    Attributes:
        labels: True label of every training image, int64 ``[n]``.
        read: Indices → uint8 images ``[k, 3, H, W]`` on the canvas.
        size: The canvas ``(H, W)``.
        target: The attacker's label.
        rate: Share of the training set that carries the trigger.
        seed: Of everything random.
        normalise: Pixels in 0…1 ``[k, 3, H, W]`` → the network's input.
        device: Where the training runs.
        folder: Where expensive preparations are kept until the run ends.
        surrogate: Trains a clean network of the victim's architecture and returns it, in evaluation mode.
        steps: Where preparations are shown.
    """

    labels: Tensor
    read: Callable[[Tensor], Tensor]
    size: tuple[int, int]
    target: int
    rate: float
    seed: int
    normalise: Callable[[Tensor], Tensor]
    device: torch.device
    folder: Path
    surrogate: Callable[[], nn.Module]
    steps: Steps

    def generator(self, purpose: int) -> torch.Generator:
        """A seeded source of numbers; another ``purpose`` gives other numbers."""
        return torch.Generator().manual_seed(seed_of(self.seed, purpose))


def seed_of(seed: int, purpose: int) -> int:
    """A seed for one purpose of a run; never the run's own."""
    return (seed * 1_000_003 + 7919 * purpose + 1) % 2**63


def _keep(images: Tensor, roles: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    return images


def _pass(pixels: Tensor, roles: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | float]:
    return pixels, 0.0


@dataclass(frozen=True)
class Attack:
    """How one training run is poisoned.

    The loop reads uint8 images, calls ``stamp``, gives every poisoned image the target label, augments, scales to
    0…1, calls ``live``, normalises, and adds what ``live`` returned beside the pixels to the cross entropy.

    Attributes:
        trigger: Gives the trigger; called after the training, because some are learned on the way.
        roles: Epoch → role of every training image, uint8 ``[n]``: ``CLEAN``, ``POISONED`` or ``CROSS`` (changed as by
            a wrong trigger, keeps its label).
        stamp: ``(uint8 [k, 3, H, W], roles [k], indices [k], generator) → uint8``, before the augmentation.
        live: ``(pixels 0…1 [k, 3, H, W], roles [k], generator) → (pixels, further loss)``, differentiable.
        redrawn: Whether each epoch poisons other images, as attackers who control the training do.
        begin: Called with the classifier and the epoch's number before each epoch.
        learned: Networks that are trained beside the classifier (Adam), saved and restored with it.
        cross: What a *wrong* trigger does to test images, ``(uint8 [n, 3, H, W]) → uint8``, where the attack promises
            that it does nothing.
        notes: For the record.
    """

    trigger: Callable[[], Trigger | None]
    roles: Roles
    stamp: Stamp = _keep
    live: Live = _pass
    redrawn: bool = False
    begin: Callable[[nn.Module, int], None] = lambda model, epoch: None
    learned: nn.Module | None = None
    cross: Callable[[Tensor], Tensor] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def count_poisoned(setup: Setup) -> int:
    """``rate · n``, rounded, at least one.

    Raises:
        UsageError: The rate is no share.
    """
    if not 0 < setup.rate <= 1:
        raise UsageError(f"the rate must lie above 0 and not above 1, not {setup.rate!r}", hint="--rate 0.1 is 10 %")
    return max(1, round(setup.rate * len(setup.labels)))


def dirty_roles(setup: Setup) -> Roles:
    """Fixed images of the other classes."""
    pool = (setup.labels != setup.target).nonzero().squeeze(1)
    return _fixed(setup, pool, min(count_poisoned(setup), len(pool)))


def clean_label_roles(setup: Setup) -> Roles:
    """Fixed images of the target class."""
    pool = (setup.labels == setup.target).nonzero().squeeze(1)
    return _fixed(setup, pool, min(count_poisoned(setup), len(pool)))


def redrawn_roles(setup: Setup, cross_ratio: float) -> Roles:
    """Other images in each epoch, ``cross_ratio`` times as many of them in the role ``CROSS``."""
    n = len(setup.labels)
    poisoned = count_poisoned(setup)
    cross = round(cross_ratio * poisoned)
    if poisoned + cross > n:
        raise UsageError(
            f"{poisoned} poisoned and {cross} cross images are more than the {n} training images",
            hint=f"the rate may be at most {1 / (1 + cross_ratio):.2f}",
        )

    def roles(epoch: int) -> Tensor:
        order = torch.randperm(n, generator=setup.generator(1000 + epoch))
        result = torch.full((n,), CLEAN, dtype=torch.uint8)
        result[order[:poisoned]] = POISONED
        result[order[poisoned : poisoned + cross]] = CROSS
        return result

    return roles


def _fixed(setup: Setup, pool: Tensor, count: int) -> Roles:
    if not count:
        raise UsageError(
            f"there is no training image that could be poisoned for target {setup.target}",
            hint="name another --target, or give images of other classes",
        )
    result = torch.full((len(setup.labels),), CLEAN, dtype=torch.uint8)
    result[pool[torch.randperm(len(pool), generator=setup.generator(1))[:count]]] = POISONED
    return lambda epoch: result


def stamp_with(trigger: Trigger) -> Stamp:
    """A fixed trigger on the poisoned images."""

    def stamp(images: Tensor, roles: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        hit = roles == POISONED
        if hit.any():
            images = images.clone()
            images[hit] = trigger(images[hit])
        return images

    return stamp
