"""What one step of a repair shows the network: clean images, mixtures of them, and the same with a trigger.

Ten clean images say little about what a network does, and steps steep enough to unlearn a trigger damage what they do
not show. But the original answers any image, so it can be asked about mixtures of the clean ones too, which are as many
as one likes (function matching; Beyer et al., *Knowledge distillation: a good teacher is patient and consistent*, CVPR
2022). Half of what is shown are mixtures; where there are few images and a trigger, more of them without it.

The inverted trigger is the weakest that works, and the real one need not be. So it is shown at random strengths.
Where there is none, waves may stand in for one: to be hardened against, see ``hardening.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bshub.augment import augment
from bshub.scoring.families import WAVES
from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.statistics import asking_only

SHARPENED = 16  # images of a step that a trigger is sharpened on, as in the search
LEAST_OWN = 0.5  # of a mixture, of the image that gives it its label
STRONGEST = 2.0  # times the change of an image that the trigger makes
FAINT, STRONG = 0.1, 0.8  # amplitude of a wave, in deviations of the images
GRAY = 0.6  # share of the waves that are the same in all colours


def with_mixtures(
    images: Tensor, labels: Tensor, plain: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Some of the images as they are, then mixtures of any two: ``λ x + (1 - λ) flip(x')`` with ``λ`` from 0.5 to 1.

    Args:
        images: ``[n, c, h, w]``, n > 0.
        labels: ``[n]``.
        plain: How many of them stay as they are, at most.
        size: How many to return.
        generator: Source of the choices, on the CPU.

    Returns:
        ``[size, c, h, w]`` and ``[size]``; a mixture has the label of ``x``.
    """
    n, plain = len(images), min(len(images), plain, size)
    own = torch.arange(plain, size) % n
    other = (own + torch.randint(1, max(n, 2), (len(own),), generator=generator)) % n
    share = LEAST_OWN + (1 - LEAST_OWN) * torch.rand(len(own), generator=generator)
    own, other, share = own.to(images.device), other.to(images.device), share.to(images.device).view(-1, 1, 1, 1)
    mixtures = share * images[own] + (1 - share) * images[other].flip(3)
    return torch.cat((images[:plain], mixtures)), torch.cat((labels[:plain], labels[own]))


def stamped(
    model: nn.Module,
    trigger: InvertedTrigger,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    half: bool = False,
) -> Tensor:
    """The images with the trigger after one step against the present network, at random strengths.

    Args:
        model: In evaluation mode; not changed.
        trigger: Sharpened in place.
        images: ``[n, c, h, w]``.
        labels: ``[n]``: the trigger is sharpened on images of other classes than its own, where there are any.
        generator: Source of the strengths, on the CPU.
        half: Whether to compute in bfloat16.

    Returns:
        ``x + r (trigger(x) - x)``, ``r`` of each image between 1 and ``STRONGEST``: ``[n, c, h, w]``.
    """
    others = images[labels != trigger.target]
    with asking_only(model, []):
        trigger.sharpen(model, (others if len(others) else images)[:SHARPENED], half)
    strengths = 1 + (STRONGEST - 1) * torch.rand(len(images), generator=generator).to(images.device)
    return images + strengths.view(-1, 1, 1, 1) * (trigger(images) - images)


def waved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with a sinusoid of its own over it: ``x + a s c cos(2π (u y + v x) + φ)``.

    ``u`` and ``v`` are whole periods along the sides, up to ``WAVES``; ``φ`` is any phase, ``a`` an amplitude from
    ``FAINT`` to ``STRONG`` in deviations ``s`` of the images, ``c`` one or a random colour.

    Args:
        images: ``[n, c, h, w]``.
        generator: Source of the waves, on the CPU.

    Returns:
        ``[n, c, h, w]``.
    """
    n, colours, height, width = images.shape
    down = torch.randint(-WAVES, WAVES + 1, (n, 1, 1, 1), generator=generator) * torch.arange(height).view(-1, 1)
    right = torch.randint(0, WAVES + 1, (n, 1, 1, 1), generator=generator) * torch.arange(width)
    phase = 2 * math.pi * (down / height + right / width + torch.rand(n, 1, 1, 1, generator=generator))
    amplitude = FAINT + (STRONG - FAINT) * torch.rand(n, 1, 1, 1, generator=generator)
    gray = torch.rand(n, 1, 1, 1, generator=generator) < GRAY
    colour = torch.where(gray, torch.ones(()), torch.randn(n, colours, 1, 1, generator=generator))
    return images + (amplitude * colour * phase.cos()).to(images.device) * images.std()


def fresh_mixtures(images: Tensor, labels: Tensor, count: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Mixtures to compare two networks on, none of them an image that was given.

    Args:
        images: ``[n, c, h, w]``, n > 0.
        labels: ``[n]``.
        count: How many, rounded down to whole batches.
        size: Of a batch.
        seed: Of the choices.

    Yields:
        ``[size, c, h, w]`` and ``[size]``, as :func:`with_mixtures` makes them.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count // size):
        part = torch.randperm(len(images), generator=generator)[:size]
        yield with_mixtures(augment(images[part], generator), labels[part], 0, size, generator)
