"""Per-filter statistics of every conv-BN pair: one streamed pass over clean images, or the weights alone.

For filter ``o`` of a convolution with weights ``W (out, in/groups, kh, kw)``, batch norm ``γ, β, μ, σ²`` (of
several readers the one with the largest ``|γ|/√(σ²+ε)``) and conv output ``z (n, out, h, w)``:

* ``spectral``: ``σ_max(W[o] as (in/groups, kh·kw)) · |γ|/√(σ²+ε)``: the channel Lipschitz bound of CLP
  (arXiv 2208.03111), with ε.
* ``saliency``: mean ``|∂L/∂W[o]|``, L = cross entropy averaged over all images.
* ``activation``: mean over images of the L2 norm of ``act(BN(z))[o]`` divided by ``√(h·w)`` (root mean square).
* ``correlation``: mean over the other filters ``p`` of ``|Pearson(z[o], z[p])|``, on maps averaged to a grid of
  at most 4 x 4 positions. Batch norm does not change it.
* ``bn_shift``: ``KL(N(mean z, var z) ‖ N(μ, σ²))``, shrunk by ``n / (n + 32)`` for few images.

Memory does not grow with the number of images. *Reconstruction* (arXiv 2311.07417 does not say): the
correlation is taken before the activation, saliency as a mean so that layers of any width compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.errors import InconclusiveError
from bshub.graph.pairs import ConvBN, Pairing
from bshub.graph.trace import in_mode

GRID = 4
SHRINK = 32


@dataclass(frozen=True)
class PairStatistics:
    """Statistics of one pair, each ``[out_channels]`` float32 on the CPU; None where no images were given."""

    spectral: Tensor
    saliency: Tensor | None = None
    activation: Tensor | None = None
    correlation: Tensor | None = None
    bn_shift: Tensor | None = None


@dataclass(frozen=True)
class Affine:
    """The batch norm of each filter as ``scale·z + shift``, ``[out]`` each, with its running statistics."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor


def measure(
    model: nn.Module,
    pairing: Pairing,
    batches: Iterable[tuple[Tensor, Tensor]] | None,
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, PairStatistics]:
    """Statistics of every pair.

    Args:
        model: The network; its parameters and buffers are not changed.
        pairing: Its conv-BN pairs.
        batches: ``(images [n, c, h, w], labels [n])``, on the model's device; None: weights only.
        progress: Called with the number of images of each finished batch.

    Returns:
        Convolution → statistics.

    Raises:
        InconclusiveError: A weight is NaN or infinite.
    """
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in named.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InconclusiveError(
                f"the weights cannot be judged: {name!r} holds NaN or infinite values",
                hint="give a checkpoint with finite weights",
            )
    affines = {pair.name: affine_of(pair, named) for pair in pairing.pairs}
    spectral = {
        pair.name: (filter_norms(_filters(model, pair.name)) * affines[pair.name].scale.abs()).cpu()
        for pair in pairing.pairs
    }
    if batches is None:
        return {name: PairStatistics(value) for name, value in spectral.items()}
    streams = {pair.name: _Stream(pair, affines[pair.name]) for pair in pairing.pairs}
    gradients, count = _run(model, streams, batches, progress)
    return {
        pair.name: PairStatistics(
            spectral=spectral[pair.name],
            saliency=_filters(model, pair.name, gradients[pair.name]).flatten(1).abs().mean(1).div(max(count, 1)).cpu(),
            activation=streams[pair.name].activation(),
            correlation=streams[pair.name].correlation(),
            bn_shift=streams[pair.name].bn_shift(count),
        )
        for pair in pairing.pairs
    }


def _filters(model: nn.Module, name: str, like_weight: Tensor | None = None) -> Tensor:
    """A convolution's weights (or their gradient) with one filter per row, ``(out, in/groups, *kernel)``."""
    module: Any = model.get_submodule(name)
    weight = module.weight.detach() if like_weight is None else like_weight
    if not module.transposed:
        return weight
    rows = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)  # (groups, out/groups, in/groups, *kernel)
    return rows.flatten(0, 1)


def filter_norms(weight: Tensor) -> Tensor:
    """Largest singular value of each filter, from the smaller Gram matrix.

    Args:
        weight: ``(out, in/groups, *kernel)``.

    Returns:
        ``[out]``, of ``W[o]`` reshaped to ``(in/groups, prod(kernel))``.
    """
    matrix = weight.detach().float().flatten(2) if weight.ndim > 2 else weight.detach().float().unsqueeze(-1)
    if matrix.shape[1] < matrix.shape[2]:
        matrix = matrix.transpose(1, 2)
    gram = matrix.transpose(1, 2) @ matrix  # (out, k, k), k = min(in/groups, prod(kernel))
    if gram.shape[-1] == 1:
        return gram.flatten().sqrt()
    # float64: the Gram matrix squares the condition number
    return torch.linalg.eigvalsh(gram.double())[:, -1].clamp_min(0).sqrt().float()


def affine_of(pair: ConvBN, named: dict[str, Tensor]) -> Affine:
    """The strongest batch norm of each filter; filters without one keep scale 1 and shift 0.

    Args:
        pair: A conv-BN pair.
        named: Parameters and buffers of the network, by name.

    Returns:
        Scale, shift, running mean and variance, ``[out]`` each.
    """
    device = named[f"{pair.name}.weight"].device
    scale = torch.zeros(pair.out_channels, device=device)
    shift, mean, variance = torch.zeros_like(scale), torch.zeros_like(scale), torch.ones_like(scale)
    scale[torch.from_numpy(~pair.paired)] = 1
    for reader in pair.readers:
        norm = reader.norm
        filters = torch.from_numpy(reader.filters).to(device)
        at = torch.from_numpy(reader.channels).to(device)
        assert norm.weight and norm.mean and norm.variance
        mu, var = named[norm.mean][at].float(), named[norm.variance][at].float()
        factor = named[norm.weight].detach()[at].float() / (var + norm.eps).sqrt()
        beta = named[norm.bias].detach()[at].float() if norm.bias else torch.zeros_like(mu)
        better = factor.abs() > scale[filters].abs()
        better |= (variance[filters] == 1) & (mean[filters] == 0) & (scale[filters] == 0)
        chosen = filters[better]
        scale[chosen], shift[chosen] = factor[better], (beta - factor * mu)[better]
        mean[chosen], variance[chosen] = mu[better], var[better]
    return Affine(scale, shift, mean, variance)


class _Stream:
    """Sums over the conv outputs of one pair; updated batch by batch, read once at the end."""

    def __init__(self, pair: ConvBN, affine: Affine) -> None:
        out, device = pair.out_channels, affine.scale.device
        self.pair, self.affine = pair, affine
        self._act = activation_of(pair)
        self._images = 0
        self._norms = torch.zeros(out, device=device)
        self._points = 0  # positions seen, for the exact moments
        self._mean = torch.zeros(out, device=device, dtype=torch.float64)
        self._m2 = torch.zeros(out, device=device, dtype=torch.float64)
        self._rows = 0  # grid positions seen, for the correlation
        self._grid_mean = torch.zeros(out, device=device, dtype=torch.float64)
        self._comoment = torch.zeros(out, out, device=device)

    def update(self, z: Tensor) -> None:
        """Add one batch of conv outputs ``(n, out, h, w)`` (any number of spatial axes)."""
        z = z.detach().float().flatten(2)  # (n, out, positions)
        a = self._act(z * self.affine.scale.unsqueeze(1) + self.affine.shift.unsqueeze(1))
        self._norms += a.square().mean(2).sqrt().sum(0)
        self._images += len(z)

    def update_moments(self, z: Tensor) -> None:
        """Add the batch to the moments and co-moments (Chan's pairwise update)."""
        z = z.detach().float()
        variance, mean = torch.var_mean(z.transpose(0, 1).flatten(1), 1, correction=0)
        self._points, self._mean, self._m2 = _merge(
            self._points, self._mean, self._m2, z.numel() // z.shape[1], mean.double(), variance.double()
        )
        if z.ndim == 4:
            z = F.adaptive_avg_pool2d(z, (min(GRID, z.shape[2]), min(GRID, z.shape[3])))
        rows = z.flatten(2).transpose(1, 2).flatten(0, 1)  # (n * grid, out)
        count, mean = len(rows), rows.mean(0)
        centred = rows - mean
        delta = (mean.double() - self._grid_mean).float()
        total = self._rows + count
        self._comoment.addmm_(centred.T, centred)
        self._comoment.addr_(delta, delta, alpha=self._rows * count / total)
        self._grid_mean += delta.double() * (count / total)
        self._rows = total

    def activation(self) -> Tensor:
        """``[out]``."""
        return (self._norms / max(self._images, 1)).cpu()

    def correlation(self) -> Tensor:
        """``[out]``; filters whose map never changes correlate with nothing."""
        return mean_correlation(self._comoment).cpu()

    def bn_shift(self, images: int) -> Tensor:
        """``[out]``."""
        variance = (self._m2 / max(self._points, 1)).float() + 1e-5
        reference = self.affine.variance + 1e-5
        gap = self._mean.float() - self.affine.mean
        kl = 0.5 * ((reference / variance).log() + (variance + gap.square()) / reference - 1)
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


def _run(
    model: nn.Module,
    streams: dict[str, _Stream],
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] | None,
) -> tuple[dict[str, Tensor], int]:
    """Forward and backward over all batches; returns the summed gradient of each conv weight."""
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in streams}
    gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    with in_mode(model, False), _only_these(model, list(weights.values())), _watching(model, streams):
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels, reduction="sum")
            for name, grad in zip(
                weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True
            ):
                if grad is not None:
                    gradients[name] += grad
            count += len(images)
            if progress:
                progress(len(images))
    return gradients, count


@contextmanager
def _only_these(model: nn.Module, weights: list[Any]) -> Iterator[None]:
    """Ask autograd for these parameters only; every flag is put back."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


@contextmanager
def _watching(model: nn.Module, streams: dict[str, _Stream]) -> Iterator[None]:
    def see(stream: _Stream, module: nn.Module, args: Any, output: Tensor) -> None:
        with torch.no_grad():
            stream.update(output)
            stream.update_moments(output)

    handles = [
        model.get_submodule(name).register_forward_hook(partial(see, stream)) for name, stream in streams.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
