"""What one step of a repair shows the network: clean images, mixtures of them, and the same with a trigger.

Ten clean images say little about what a network does, and steps steep enough to unlearn a trigger damage what they do
not show. But the original answers any image, so it can be asked about mixtures of the clean ones too, which are as many
as one likes (function matching; Beyer et al., *Knowledge distillation: a good teacher is patient and consistent*, CVPR
2022). Half of what is shown are mixtures; where there are few images and a trigger, more of them without it.

The inverted trigger is the weakest that works, and the real one need not be. So it is shown at random strengths.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.statistics import asking_only

SHARPENED = 16  # images of a step that a trigger is sharpened on, as in the search
LEAST_OWN = 0.5  # of a mixture, of the image that gives it its label
STRONGEST = 2.0  # times the change of an image that the trigger makes


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
