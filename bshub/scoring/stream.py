"""Sums over the outputs of one convolution, for its filters' statistics; ``statistics.py`` says what they are.

The sums of several processes are merged by the same formula as those of several batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bshub.graph.pairs import ConvBN, Reader
from bshub.parallel import Workers

GRID = 4
SHRINK = 32


@dataclass(frozen=True)
class Affine:
    """The batch norm of each filter as ``scale·z + shift``, ``[out]`` each, with its running statistics."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor


def affine_of(pair: ConvBN, named: dict[str, Tensor]) -> Affine:
    """The strongest batch norm of each filter; filters without one keep scale 1 and shift 0.

    Args:
        pair: A conv-BN pair.
        named: Parameters and buffers of the network, by name.

    Returns:
        Scale, shift, running mean and variance, ``[out]`` each.
    """
    device = named[f"{pair.name}.weight"].device
    if len(pair.readers) == 1 and np.array_equal(pair.readers[0].filters, np.arange(pair.out_channels)):
        return _normalised(pair.readers[0], named, device)  # nothing to choose, as in most networks
    scale = torch.zeros(pair.out_channels, device=device)
    shift, mean, variance = torch.zeros_like(scale), torch.zeros_like(scale), torch.ones_like(scale)
    scale[torch.from_numpy(~pair.paired)] = 1
    for reader in pair.readers:
        filters, own = torch.from_numpy(reader.filters).to(device), _normalised(reader, named, device)
        better = own.scale.abs() > scale[filters].abs()
        better |= (variance[filters] == 1) & (mean[filters] == 0) & (scale[filters] == 0)
        chosen = filters[better]
        scale[chosen], shift[chosen] = own.scale[better], own.shift[better]
        mean[chosen], variance[chosen] = own.mean[better], own.variance[better]
    return Affine(scale, shift, mean, variance)


def _normalised(reader: Reader, named: dict[str, Tensor], device: torch.device) -> Affine:
    """One batch norm, at the channels where it reads the filters."""
    norm, at = reader.norm, torch.from_numpy(reader.channels).to(device)
    assert norm.weight and norm.mean and norm.variance
    mean, variance = named[norm.mean][at].float(), named[norm.variance][at].float()
    scale = named[norm.weight].detach()[at].float() / (variance + norm.eps).sqrt()
    beta = named[norm.bias].detach()[at].float() if norm.bias else torch.zeros_like(mean)
    return Affine(scale, beta - scale * mean, mean, variance)


def shift_of(mean: Tensor, variance: Tensor, affine: Affine) -> Tensor:
    """``KL(N(mean, variance) ‖ N(μ, σ²))`` of what images show from what batch norm remembers.

    Args:
        mean: ``[out]``.
        variance: ``[out]``.
        affine: With the running statistics.

    Returns:
        ``[out]``, in nats.
    """
    seen, reference = variance + 1e-5, affine.variance + 1e-5
    return 0.5 * ((reference / seen).log() + (seen + (mean - affine.mean).square()) / reference - 1)


class Stream:
    """Sums over the conv outputs of one pair; updated batch by batch, read once at the end.

    Args:
        pair: The pair.
        affine: Its batch norm.
        taylor: Whether ``watch`` and ``settle`` are called with every batch.
    """

    def __init__(self, pair: ConvBN, affine: Affine, taylor: bool = False) -> None:
        self.pair, self.affine, self._taylor = pair, affine, taylor
        self._act = activation_of(pair)
        self._offset = torch.where(affine.scale != 0, affine.shift / affine.scale, 0)  # BN(z) = scale · (z + offset)
        self._clear()

    def _clear(self) -> None:
        out, device = self.pair.out_channels, self.affine.scale.device
        self._images = 0
        self._norms = torch.zeros(out, device=device)
        self._points = 0  # positions seen, for the exact moments
        self._mean = torch.zeros(out, device=device, dtype=torch.float64)
        self._m2 = torch.zeros(out, device=device, dtype=torch.float64)
        self._rows = 0  # grid positions seen, for the correlation
        self._grid_mean = torch.zeros(out, device=device, dtype=torch.float64)
        self._comoment = torch.zeros(out, out, device=device)
        self._effects = torch.zeros(out, device=device, dtype=torch.float64)  # Σ over images of their squares
        self._effect: Tensor | float = 0.0  # of the batch at hand, (n, out)

    def update(self, z: Tensor) -> None:
        """Add one batch of conv outputs ``(n, out, h, w)`` (any number of spatial axes)."""
        z = z.detach().float()
        self._update_norms(z.flatten(2))
        self._update_comoments(z)

    def _update_norms(self, z: Tensor) -> None:
        """Norms and moments, from maps ``(n, out, positions)``.

        ``torch.var_mean`` would take as long as a convolution. Sums of squares are as exact once the running mean is
        taken away, and those of each image, which has equally many positions, are put together in float64.
        """
        affine, points = self.affine, z.shape[2]
        centred = z - affine.mean.unsqueeze(1)
        means = centred.mean(2).double()
        squares = torch.linalg.vector_norm(centred, dim=2).double().square() / points
        mean = means.mean(0)
        variance = (squares.mean(0) - mean.square()).clamp_min(0)
        self._points, self._mean, self._m2 = _merge(
            self._points, self._mean, self._m2, len(z) * points, mean + affine.mean.double(), variance
        )
        beta = affine.shift + affine.scale * affine.mean
        a = self._act(torch.addcmul(beta.unsqueeze(1), centred, affine.scale.unsqueeze(1)))
        self._norms += torch.linalg.vector_norm(a, dim=2).sum(0) / points**0.5
        self._images += len(z)

    def _update_comoments(self, z: Tensor) -> None:
        """Co-moments of the maps averaged to the grid (Chan's pairwise update)."""
        if z.ndim == 4:
            z = F.adaptive_avg_pool2d(z, (min(GRID, z.shape[2]), min(GRID, z.shape[3])))
        rows = z.flatten(2).transpose(1, 2).flatten(0, 1)  # (n * grid, out)
        mean = rows.mean(0)
        centred = rows - mean
        self._comoment.addmm_(centred.T, centred)
        self._shift(len(rows), mean.double())

    def watch(self, z: Tensor) -> None:
        """Note what the filters of ``z`` mean to the loss, once the backward run comes by.

        ``BN(z) · ∂L/∂BN(z) = (z + shift/scale) · ∂L/∂z``, summed over the positions of an image, is to first order
        what L loses when the filter does.
        """
        output = z.detach()

        def note(gradient: Tensor) -> None:
            y = output.float().flatten(2) + self._offset.unsqueeze(1)  # (n, out, positions)
            effect = (y * gradient.float().flatten(2)).sum(2)
            if isinstance(self._effect, Tensor) and self._effect.shape != effect.shape:
                self.settle()  # runs on other numbers of images have nothing to do with each other
            self._effect = self._effect + effect

        if z.requires_grad:
            z.register_hook(note)

    def settle(self) -> None:
        """The backward run of a batch is over: a module that ran several times counts once per image."""
        if isinstance(self._effect, Tensor):
            self._effects += self._effect.double().square().sum(0)
        self._effect = 0.0

    def _shift(self, count: int, mean: Tensor) -> None:
        """Account for ``count`` new rows around another mean, whose own co-moments are already added."""
        delta, total = (mean - self._grid_mean).float(), self._rows + count
        self._comoment.addr_(delta, delta, alpha=self._rows * count / total)
        self._grid_mean += delta.double() * (count / total)
        self._rows = total

    def merge(self, workers: Workers) -> None:
        """Put the sums of all processes together, in their order, in each of them.

        Args:
            workers: The processes.
        """
        counts = torch.tensor([[self._images, self._points, self._rows]])
        vectors = torch.stack((self._norms.double(), self._mean, self._m2, self._grid_mean, self._effects)).unsqueeze(0)
        sums = workers.gather(counts), workers.gather(vectors), workers.gather(self._comoment.unsqueeze(0))
        self._clear()
        for count, vector, comoment in zip(*sums, strict=True):
            (images, points, rows), (norms, mean, m2, grid_mean, effects) = count[0].tolist(), vector[0]
            self._images += images
            self._effects += effects
            self._norms += norms.float()
            if points:
                merged = _merge(self._points, self._mean, self._m2, points, mean, m2 / points)
                self._points, self._mean, self._m2 = merged
            if rows:
                self._comoment += comoment[0]
                self._shift(rows, grid_mean)

    def activation(self) -> Tensor:
        """``[out]``."""
        return (self._norms / max(self._images, 1)).cpu()

    def taylor(self) -> Tensor | None:
        """``[out]``; None where nobody watched."""
        return (self._effects / max(self._images, 1)).float().cpu() if self._taylor else None

    def correlation(self) -> Tensor:
        """``[out]``; filters whose map never changes correlate with nothing."""
        return mean_correlation(self._comoment).cpu()

    def bn_shift(self, images: int) -> Tensor:
        """``[out]``."""
        kl = shift_of(self._mean.float(), (self._m2 / max(self._points, 1)).float(), self.affine)
        return (kl * images / (images + SHRINK)).cpu()


def mean_correlation(comoment: Tensor) -> Tensor:
    """Mean absolute Pearson correlation with the other filters.

    Args:
        comoment: ``Σ (x - mean)(x - mean)ᵀ``, ``(out, out)``.

    Returns:
        ``[out]``; 0 for a constant filter or a layer of one.
    """
    deviation = comoment.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(deviation > 1e-6 * deviation.max().clamp_min(1e-30), 1 / deviation, 0)
    pearson = (comoment * inverse).mul_(inverse.unsqueeze(1)).abs_().clamp_max_(1)
    pearson.fill_diagonal_(0)
    return pearson.sum(1) / max(len(comoment) - 1, 1)


def _merge(n: int, mean: Tensor, m2: Tensor, k: int, other: Tensor, variance: Tensor) -> tuple[int, Tensor, Tensor]:
    total, delta = n + k, other - mean
    return total, mean + delta * (k / total), m2 + variance * k + delta.square() * (n * k / total)


def activation_of(pair: ConvBN) -> Callable[[Tensor], Tensor]:
    """The activation that follows a pair's first batch norm, or the identity.

    Args:
        pair: A conv-BN pair.

    Returns:
        A function of ``BN(z)``, of the same shape.
    """
    found = pair.readers[0].activation
    if found is None:
        return lambda z: z
    name, args = found
    operation: Any = getattr(torch.ops.aten, name)
    return lambda z: operation(z, *args)
