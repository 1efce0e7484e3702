"""WaNet (arXiv 2102.10369, section 3): the trigger is a smooth warp; the attacker controls the training.

Each epoch warps other images: ``rate · n`` become the target, and twice as many (``cross_ratio``) are warped by the
field plus fresh noise and keep their label, so that the network learns this very warp and no other (*noise mode*).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bshub.errors import UsageError
from bshub.evaluation.attacks.interface import CROSS, POISONED, Attack, Setup, redrawn_roles
from bshub.evaluation.attacks.trigger import Trigger
from bshub.evaluation.attacks.warp import control_grid, noisy_field, warp, warp_field


def wanet(setup: Setup, k: int = 4, s: float = 0.5, rescale: float = 1.0, cross_ratio: float = 2.0) -> Attack:
    """Warp images in the role poisoned, noisily warp those in the role cross.

    Args:
        setup: The run.
        k: Control points along each side.
        s: Strength; 0.5 moves the mean pixel by a quarter of a pixel along each axis.
        rescale: Factor on all coordinates (grid rescale).
        cross_ratio: Noise-mode images for each poisoned one.

    Returns:
        The attack on this run.

    Raises:
        UsageError: A hyper-parameter is out of its range.
    """
    if not (2 <= k <= 256 and 0 < s <= 1e3 and 0 < rescale <= 10 and cross_ratio >= 0):
        raise UsageError(
            "k must be 2 to 256, s, rescale and cross_ratio must be above zero",
            hint="leave --option away for the default; docs/attacks.md says what it does",
        )
    grid = control_grid(k, setup.generator(2))
    trigger = Trigger("warp", setup.target, setup.size, {"grid": grid, "strength": float(s), "rescale": float(rescale)})
    field = warp_field(grid, s, rescale, setup.size)

    def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
        warped = warp(images.float(), noisy_field(field, len(images), generator))
        return warped.round().clamp_(0, 255).to(torch.uint8)

    def stamp(images: Tensor, roles: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        images = images.clone()
        hit, cross = roles == POISONED, roles == CROSS
        if hit.any():
            images[hit] = trigger(images[hit])
        if cross.any():
            images[cross] = noisy(images[cross], generator)
        return images

    return Attack(
        trigger=lambda: trigger,
        roles=redrawn_roles(setup, cross_ratio),
        stamp=stamp,
        redrawn=True,
        cross=lambda images: noisy(images, setup.generator(3)),
        notes={"k": k, "s": s, "rescale": rescale, "cross_ratio": cross_ratio},
    )
