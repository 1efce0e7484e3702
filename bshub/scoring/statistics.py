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
* ``taylor`` (where it is asked for): mean over images of ``(Σ BN(z)[o] · ∂L/∂BN(z)[o])²``, L = cross entropy of the
  image and the sum over its positions: to first order the squared change of the loss if the filter left, the
  importance of Molchanov et al. 2019 (arXiv 1906.10771, equation 8) with the batch norm's output as the gate. The
  batch norm is affine, so this is ``(Σ W[o]·∂L/∂W[o] + shift/scale · Σ ∂L/∂z[o])²``, taken from the same backward run.
* ``tac`` (where an inverted trigger was found, ``response.py``): the change of ``act(BN(z))[o]`` under it.

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

from bshub.copying import named_tensors
from bshub.errors import InconclusiveError
from bshub.graph.pairs import Pairing
from bshub.graph.trace import in_mode
from bshub.parallel import Workers
from bshub.scoring.stream import Stream, affine_of


@dataclass(frozen=True)
class PairStatistics:
    """Statistics of one pair, each ``[out_channels]`` float32 on the CPU; None where no images were given."""

    spectral: Tensor
    saliency: Tensor | None = None
    activation: Tensor | None = None
    correlation: Tensor | None = None
    bn_shift: Tensor | None = None
    taylor: Tensor | None = None
    tac: Tensor | None = None


def measure(
    model: nn.Module,
    pairing: Pairing,
    batches: Iterable[tuple[Tensor, Tensor]] | None,
    *,
    taylor: bool = False,
    workers: Workers | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, PairStatistics]:
    """Statistics of every pair.

    Args:
        model: The network; its parameters and buffers are not changed.
        pairing: Its conv-BN pairs.
        batches: ``(images [n, c, h, w], labels [n])``, on the model's device; None: weights only.
        taylor: Whether the importance of each filter is measured too.
        workers: Processes that each stream their own batches; all get the statistics of all images.
        progress: Called with the number of images of each finished batch.

    Returns:
        Convolution → statistics.

    Raises:
        InconclusiveError: A weight is NaN or infinite.
    """
    named = named_tensors(model)
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
    streams = {pair.name: Stream(pair, affines[pair.name], taylor) for pair in pairing.pairs}
    gradients, count = _run(model, streams, batches, progress, taylor)
    if workers is not None and workers.size > 1:
        for name, stream in streams.items():
            stream.merge(workers)
            gradients[name] = torch.stack(workers.gather(gradients[name].unsqueeze(0))).sum(0)[0]
        count = int(workers.sums([count])[0])
    return {
        pair.name: PairStatistics(
            spectral=spectral[pair.name],
            saliency=_filters(model, pair.name, gradients[pair.name]).flatten(1).abs().mean(1).div(max(count, 1)).cpu(),
            activation=streams[pair.name].activation(),
            correlation=streams[pair.name].correlation(),
            bn_shift=streams[pair.name].bn_shift(count),
            taylor=streams[pair.name].taylor(),
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
    if 1 in matrix.shape[1:]:  # 1x1 or depthwise: a vector has one singular value, its length
        return torch.linalg.vector_norm(matrix, dim=(1, 2))
    if matrix.shape[1] < matrix.shape[2]:
        matrix = matrix.transpose(1, 2)
    k = matrix.shape[2]  # min(in/groups, prod(kernel))
    if matrix.shape[1] % 2:
        gram = matrix.transpose(1, 2) @ matrix  # (out, k, k)
    else:  # two rows side by side: a product of 2k columns is the faster one, though half of it is not needed
        rows = matrix.reshape(len(matrix), -1, 2 * k)
        both = rows.transpose(1, 2) @ rows
        gram = both[:, :k, :k] + both[:, k:, k:]
    # float64: the Gram matrix squares the condition number
    return torch.linalg.eigvalsh(gram.double())[:, -1].clamp_min(0).sqrt().float()


def _run(
    model: nn.Module,
    streams: dict[str, Stream],
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] | None,
    taylor: bool,
) -> tuple[dict[str, Tensor], int]:
    """Forward and backward over all batches; returns the summed gradient of each conv weight."""
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in streams}
    gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    with in_mode(model, False), asking_only(model, list(weights.values())), _watching(model, streams, taylor):
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels, reduction="sum")
            for name, grad in zip(
                weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True
            ):
                if grad is not None:
                    gradients[name] += grad
            for stream in streams.values():
                stream.settle()
            count += len(images)
            if progress:
                progress(len(images))
    return gradients, count


@contextmanager
def asking_only(model: nn.Module, weights: list[Any]) -> Iterator[None]:
    """Ask autograd for these parameters only; every flag is put back.

    Args:
        model: The network.
        weights: Those of its parameters that get a gradient.

    Returns:
        A context manager.
    """
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
def _watching(model: nn.Module, streams: dict[str, Stream], taylor: bool) -> Iterator[None]:
    def see(stream: Stream, module: nn.Module, args: Any, output: Tensor) -> None:
        if taylor:
            stream.watch(output)
        with torch.no_grad():
            stream.update(output)

    handles = [
        model.get_submodule(name).register_forward_hook(partial(see, stream)) for name, stream in streams.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
