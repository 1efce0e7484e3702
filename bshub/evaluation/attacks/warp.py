"""WaNet's warp (arXiv 2102.10369, section 3.2): a smooth, small, fixed displacement of all pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def control_grid(k: int, generator: torch.Generator) -> Tensor:
    """The normalised control grid ``ψ(rand[-1, 1](k, k, 2))`` with ``ψ(A) = A / mean |A|`` (equations 4 and 5).

    Args:
        k: Control points along each side.
        generator: Source of the numbers.

    Returns:
        ``(k, k, 2)``, x before y.
    """
    grid = torch.rand(k, k, 2, generator=generator) * 2 - 1
    return grid / grid.abs().mean()


def warp_field(grid: Tensor, strength: float, rescale: float, size: tuple[int, int]) -> Tensor:
    """Where each pixel is taken from: ``φ(identity + strength · ↑grid / H)``, clipped to the image by φ.

    The control grid is upsampled bicubically to the canvas. The division by the height, in coordinates from -1 to 1,
    is the official code's: ``strength`` 0.5 moves the mean pixel by a quarter of a pixel along each axis.

    Args:
        grid: ``(k, k, 2)``.
        strength: The paper's s.
        rescale: Factor on all coordinates; 1 leaves the corners in place.
        size: ``(height, width)``.

    Returns:
        ``(1, height, width, 2)`` coordinates in -1…1, x before y.
    """
    up = F.interpolate(grid.permute(2, 0, 1).unsqueeze(0), size=size, mode="bicubic", align_corners=True)
    field = identity_field(size) + strength * up.permute(0, 2, 3, 1) / size[0]  # (1, H, W, 2)
    return (field * rescale).clamp(-1, 1)


def noisy_field(field: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The noise mode's fields (section 3.3): each of ``count`` images gets ``field`` plus ``rand[-1, 1] / H``."""
    noise = torch.rand(count, *field.shape[1:], generator=generator) * 2 - 1  # (count, H, W, 2)
    return (field + noise / field.shape[1]).clamp(-1, 1)


def identity_field(size: tuple[int, int]) -> Tensor:
    """``(1, height, width, 2)``: every pixel is taken from its own place."""
    rows, columns = torch.linspace(-1, 1, size[0]), torch.linspace(-1, 1, size[1])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], -1).unsqueeze(0)


def warp(images: Tensor, field: Tensor) -> Tensor:
    """Sample images bilinearly at a field, one for all ``(1, H, W, 2)`` or one each ``(n, H, W, 2)``."""
    field = field.to(images.device).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, field, align_corners=True)
