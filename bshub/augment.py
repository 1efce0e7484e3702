"""More images out of few: flips and small shifts, which do not change what an image shows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SHIFT = 1 / 16  # of the image's side, in each direction


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images and shift each by up to a sixteenth of its side (reflection at the border).

    Args:
        images: ``(n, c, h, w)``.
        generator: Source of the choices, on the CPU.

    Returns:
        A new tensor of the same shape.
    """
    n, _, height, width = images.shape
    reach_y, reach_x = max(1, int(height * SHIFT)), max(1, int(width * SHIFT))
    flips = (torch.rand(n, generator=generator) < 0.5).to(images.device)
    images = torch.where(flips.view(n, 1, 1, 1), images.flip(3), images)
    padded = F.pad(images, (reach_x, reach_x, reach_y, reach_y), mode="reflect")
    tops = torch.randint(0, 2 * reach_y + 1, (n,), generator=generator).tolist()
    lefts = torch.randint(0, 2 * reach_x + 1, (n,), generator=generator).tolist()
    return torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, top, left in zip(padded, tops, lefts, strict=True)
        ]
    )
