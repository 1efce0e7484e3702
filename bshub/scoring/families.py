"""Families of changes that a trigger may be: how one is put on images, what its strength is, how it is stepped.

Strength is the root mean square of ``δ`` or, where ``δ`` is to be a patch, the mean over the places of the length of
their colour change, which makes it sparse. ``FAMILIES`` is the registry: a family is one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GRID = 8  # nodes of a warp along each side
PLACES = 0.03  # share of the places that one step of a sparse change touches
HIGHEST = 3.0  # change of one place in a patch, in deviations of the clean images: about black to white
TINY = 1e-12

Shape = tuple[int, ...]


def additive(images: Tensor, change: Tensor) -> Tensor:
    """``x + δ``, in deviations of the clean images: patches, blends and stripes.

    Args:
        images: ``[n, c, h, w]``.
        change: ``[c, h, w]``.

    Returns:
        ``[n, c, h, w]``.
    """
    return images + change * images.std()


def warp(images: Tensor, change: Tensor) -> Tensor:
    """``x`` read at ``p + δ(p)``, with ``δ`` bicubic between 8 by 8 nodes; the image spans -1 to 1.

    Args:
        images: ``[n, c, h, w]``.
        change: ``[2, GRID, GRID]``: to the right and down.

    Returns:
        ``[n, c, h, w]``; the border continues what lies on it.
    """
    n, _, height, width = images.shape
    field = F.interpolate(change.unsqueeze(0), (height, width), mode="bicubic", align_corners=True)
    still = F.affine_grid(torch.eye(2, 3, device=images.device).unsqueeze(0), [1, 1, height, width], align_corners=True)
    places = (still + field.permute(0, 2, 3, 1)).expand(n, -1, -1, -1)
    return F.grid_sample(images, places, padding_mode="border", align_corners=True)


def dense_step(slope: Tensor, size: float) -> Tensor:
    """Everywhere.

    Args:
        slope: Of the loss, any shape.
        size: Root mean square of the step.

    Returns:
        The step, of the same shape.
    """
    return slope * (size / (_rms(slope) + TINY))


def dense_fit(change: Tensor, strength: float) -> Tensor:
    """Projection onto a root mean square of at most ``strength``.

    Args:
        change: Any shape.
        strength: The bound.

    Returns:
        The change, no larger.
    """
    return change / (_rms(change) / strength).clamp_min(1)


def sparse_step(slope: Tensor, size: float) -> Tensor:
    """At the places with the steepest slope only: the steepest descent of a sparse change.

    Args:
        slope: Of the loss, ``[c, h, w]``.
        size: Half of the mean length over all places.

    Returns:
        The step, ``[c, h, w]``, zero at all but ``PLACES`` of the places.
    """
    steep = slope.norm(dim=0)
    few = steep >= steep.flatten().topk(max(1, round(PLACES * steep.numel()))).values[-1]
    kept = slope * few
    return kept * (2 * size / (kept.norm(dim=0).mean() + TINY))


def sparse_fit(change: Tensor, strength: float) -> Tensor:
    """Soft threshold of the places' lengths to a mean of at most ``strength``, which none above ``HIGHEST`` survives.

    Args:
        change: ``[c, h, w]``.
        strength: The bound.

    Returns:
        ``[c, h, w]``.
    """
    norms = change.norm(dim=0)
    capped = norms.clamp_max(HIGHEST)
    if float(capped.mean()) > strength:
        low, high = torch.zeros(()), capped.max().cpu()
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if float((capped - middle).clamp_min(0).mean()) > strength else (low, middle)
        capped = (capped - high.to(capped.device)).clamp_min(0)
    return change * (capped / (norms + TINY))


@dataclass(frozen=True)
class Family:
    """A kind of change.

    Attributes:
        apply: ``(images, change) → images``.
        shape: Shape of the images → shape of the change.
        start: Strength that a search begins with.
        most: Strength beyond which a change is no trigger any more: it may show another class to anyone.
        step: ``(slope, size)`` → how far to go against the slope.
        fit: ``(change, strength)`` → the nearest change of at most that strength.
        local: Whether it is of a few places: a stroke, or a part by which a class is known, may be such a change.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    shape: Callable[[Shape], Shape]
    start: float
    most: float
    step: Callable[[Tensor, float], Tensor]
    fit: Callable[[Tensor, float], Tensor]
    local: bool = False


FAMILIES: dict[str, Family] = {
    "additive": Family(additive, lambda image: image[1:], 0.2, 0.28, dense_step, dense_fit),
    "patch": Family(additive, lambda image: image[1:], 0.1, 0.12, sparse_step, sparse_fit, local=True),
    "warp": Family(warp, lambda image: (2, GRID, GRID), 0.02, 0.03, dense_step, dense_fit),
}


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
