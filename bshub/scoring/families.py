"""Families of changes that a trigger may be: how one is put on images, what its strength is, how it is stepped.

Strength is the root mean square of ``δ`` or, where ``δ`` is to be a patch, the mean over the places of the length of
their colour change, which makes it sparse; of waves it is the sum of their amplitudes, which makes them few.
``FAMILIES`` is the registry: a family is one line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GRID = 8  # nodes of a warp along each side
PLACES = 0.03  # share of the places that one step of a sparse change touches
WAVES = 8  # periods along a side of the shortest wave
WAVELENGTHS = 0.03  # share of the waves that one step touches
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


def waves(images: Tensor, change: Tensor) -> Tensor:
    """``x + Σ (a cos φ + b sin φ)`` over waves ``φ = 2π (u y + v x)``, in deviations of the clean images: sinusoids.

    Args:
        images: ``[n, c, h, w]``.
        change: ``[2, c, 2 WAVES + 1, WAVES + 1]``: ``a`` and ``b`` by ``u`` from -WAVES and ``v`` from 0, in periods.

    Returns:
        ``[n, c, h, w]``.
    """
    height, width = images.shape[-2:]
    periods = torch.arange(-WAVES, WAVES + 1, device=images.device)
    down, right = _phases(periods, height), _phases(periods[WAVES:], width)
    drawn = torch.einsum("cuv,uh,vw->chw", torch.complex(change[0], -change[1]), down, right).real
    return images + drawn * images.std()


def _phases(periods: Tensor, side: int) -> Tensor:
    """``exp(2πi · period · place)``, ``[periods, side]``; places from 0 to 1."""
    turns = periods.float().outer(torch.arange(side, device=periods.device) / side)
    return torch.polar(torch.ones_like(turns), 2 * math.pi * turns)


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
    kept = slope * _steepest(slope.norm(dim=0), PLACES)
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
    return change * (_shrunk(norms.clamp_max(HIGHEST), strength) / (norms + TINY))


def wave_step(slope: Tensor, size: float) -> Tensor:
    """Of the waves with the steepest slope only.

    Args:
        slope: Of the loss, ``[2, c, u, v]``.
        size: Half of the sum of amplitudes.

    Returns:
        The step, of the same shape, zero at all but ``WAVELENGTHS`` of the waves.
    """
    kept = slope * _steepest(_amplitudes(slope), WAVELENGTHS)
    return kept * (2 * size / (_amplitudes(kept).sum() + TINY))


def wave_fit(change: Tensor, strength: float) -> Tensor:
    """Soft threshold of the amplitudes to a sum of at most ``strength``.

    Args:
        change: ``[2, c, u, v]``.
        strength: The bound.

    Returns:
        The change, of no more waves.
    """
    amplitudes = _amplitudes(change)
    return change * (_shrunk(amplitudes, strength / amplitudes.numel()) / (amplitudes + TINY))


def _amplitudes(change: Tensor) -> Tensor:
    """Of each wave, the root mean square over the colours: ``[u, v]``."""
    return change.square().sum(0).mean(0).sqrt()


def _steepest(lengths: Tensor, share: float) -> Tensor:
    """Which belong to the largest share of them, at least one."""
    return lengths >= lengths.flatten().topk(max(1, round(share * lengths.numel()))).values[-1]


def _shrunk(lengths: Tensor, mean: float) -> Tensor:
    """Lengths less the threshold at which their mean is no larger than told, and not below zero."""
    if float(lengths.mean()) <= mean:
        return lengths
    low, high = torch.zeros(()), lengths.max().cpu()
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if float((lengths - middle).clamp_min(0).mean()) > mean else (low, middle)
    return (lengths - high.to(lengths.device)).clamp_min(0)


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
        recalled: Whether a class that stands out proves nothing, since innocent networks have one too: what batch norm
            remembers decides, see ``recall.py``.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    shape: Callable[[Shape], Shape]
    start: float
    most: float
    step: Callable[[Tensor, float], Tensor]
    fit: Callable[[Tensor, float], Tensor]
    local: bool = False
    recalled: bool = False


FAMILIES: dict[str, Family] = {
    "additive": Family(additive, lambda image: image[1:], 0.2, 0.28, dense_step, dense_fit),
    "patch": Family(additive, lambda image: image[1:], 0.1, 0.12, sparse_step, sparse_fit, local=True),
    "waves": Family(
        waves, lambda image: (2, image[1], 2 * WAVES + 1, WAVES + 1), 0.3, 0.6, wave_step, wave_fit, recalled=True
    ),
    "warp": Family(warp, lambda image: (2, GRID, GRID), 0.02, 0.03, dense_step, dense_fit),
}


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
