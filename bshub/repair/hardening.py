"""Where nothing was found, and it is asked for: make the network indifferent to faint waves.

A backdoor that one training image of a hundred taught may take hold only in part. Then no search tells its target from
the class that a wave reaches most easily in any network, and batch norm hardly remembers it. But such a backdoor is
shallow, too: a few steps in which random waves over the clean images are to change nothing take half of it or more.

An innocent network pays for that, most of all where clean images do not show it. So as many mixtures of them are held
against it as one likes (``lesson.py``), five times as many as there are waves, and of the way as much is kept as leaves
``AGREES`` of fresh mixtures answered as before. What it costs all the same is seen neither on the clean images nor on
the mixtures: a few tenths of a point in one kind of network, up to two and a half in another. Hence it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bshub.device import in_bf16
from bshub.graph.trace import in_mode
from bshub.parallel import Workers
from bshub.repair.finetune import Schedule, epochs_of, repair
from bshub.repair.lesson import fresh_mixtures
from bshub.repair.unlearning import keep_share

AGREES = 0.96  # three innocent networks for photographs, right on 78 % of them, lost 0.1 to 0.4 points there (n=6000)
MIXTURES, BATCH = 1024, 32
SHARES = tuple(tenth / 10 for tenth in range(10, 0, -1))  # of the way


@dataclass(frozen=True)
class Hardening:
    """What became of it.

    Attributes:
        share: Of the way that was kept, 0 to 1; at 0 the network is as it was.
        agreement: Share of fresh mixtures that are answered as before.
        passes: Over the clean images.
    """

    share: float
    agreement: float
    passes: int


def harden(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    original: nn.Module,
    *,
    workers: Workers | None = None,
    progress: Callable[[int], None] | None = None,
) -> Hardening:
    """Harden a network against faint waves, in place.

    Args:
        model: A copy of the original.
        images: Clean, ``[n, c, h, w]``.
        labels: ``[n]``; every class should be among them, what is not shown is not held on to.
        schedule: Learning rate, batch size, seed, precision; the passes are :func:`passes_of` it.
        original: Not changed.
        workers: Processes that all call this with the same images.
        progress: Called with 1 after every pass.

    Returns:
        How far it went.
    """
    short, half = replace(schedule, epochs=1), schedule.precision == "bf16"
    repair(model, original, images, labels, {}, "distil", short, waves=True, workers=workers, progress=progress)
    wanted = _answers(original, images, labels, schedule.seed, half)
    alike = 1.0

    def agrees() -> bool:
        nonlocal alike
        alike = float((_answers(model, images, labels, schedule.seed, half) == wanted).float().mean())
        return alike >= AGREES

    share = keep_share(model, original.state_dict(), agrees, SHARES)
    return Hardening(share, alike if share else 1.0, passes_of(schedule, len(images)))


def passes_of(schedule: Schedule, images: int) -> int:
    """Passes that it takes: as few as make the least steps of a repair that unlearns something."""
    return epochs_of(replace(schedule, epochs=1), images, True)


def _answers(model: nn.Module, images: Tensor, labels: Tensor, seed: int, half: bool) -> Tensor:
    """To ``MIXTURES`` mixtures of the images, the same for the same seed: ``[MIXTURES]``."""
    with torch.no_grad(), in_mode(model, False), in_bf16(images.device, half):
        mixtures = fresh_mixtures(images, labels, MIXTURES, BATCH, seed)
        return torch.cat([model(batch).argmax(1) for batch, _ in mixtures])
