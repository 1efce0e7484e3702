"""What the adaptive attack trains against: the scores that a defender would see, with gradients to the weights.

``PENALTIES`` is the registry: a look that can be hidden from is one function and one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bshub.copying import named_tensors
from bshub.graph.pairs import ConvBN
from bshub.graph.trace import in_mode
from bshub.scoring.selection import standardize
from bshub.scoring.shifted import CHANCE
from bshub.scoring.statistics import PairStatistics, _filters
from bshub.scoring.stream import SHRINK, activation_of, affine_of, shift_of
from bshub.scoring.suspiciousness import lipschitz

FLOOR = 1e-3  # of the layer's mean, for the root's slope
DEFENDER = 100  # clean images that the defender is taken to have: ten for each of ten classes
TINY = 1e-12


@dataclass(frozen=True)
class View:
    """What an attacker holds while the network trains.

    Attributes:
        model: The network.
        pairs: Its conv-BN pairs.
        channels: Convolution → indices of the channels that the trigger moves most, ``[k]``.
        clean: Training images, ``[n, 3, h, w]``, normalised.
        stamped: The same with the trigger.
    """

    model: nn.Module
    pairs: tuple[ConvBN, ...]
    channels: dict[str, Tensor]
    clean: Tensor
    stamped: Tensor


def against_weights(view: View) -> Tensor:
    """``mean relu(z)`` of the triggered channels, z the standardised ``lipschitz``: hides from ``--score lipschitz``.

    Args:
        view: Model and channels.

    Returns:
        A scalar with a gradient to the weights.
    """
    scores = []
    for pair in view.pairs:
        spectral = spectral_bound(view.model, pair)
        spectral = spectral.clamp_min(FLOOR * float(spectral.detach().mean()) + TINY)  # the root has no slope at zero
        z = standardize(lipschitz(PairStatistics(spectral)))
        scores.append(z[view.channels[pair.name]].relu())
    return torch.cat(scores).mean().float()


def against_default(view: View) -> Tensor:
    """Hides from the default: ``mean relu(z) + mean log(1 + KL / bound)`` of the triggered channels.

    z is the standardised ``tac`` under the attacker's own trigger, of which the defender's inverted one is a likeness.
    ``KL`` of the clean images' map from the running statistics is what the look at batch norm flags above its bound
    (``scoring/shifted.py``), for ``DEFENDER`` images. Its logarithm: early in a training, when the running statistics
    lag behind, KL is thousands of bounds, and its own slope would end the training.

    Args:
        view: Model, channels and images.

    Returns:
        A scalar with a gradient to the weights.
    """
    named = named_tensors(view.model)
    outputs = conv_outputs(view.model, view.pairs, torch.cat([view.clean, view.stamped]))
    answers, shifts = [], []
    for pair in view.pairs:
        chosen, affine = view.channels[pair.name], affine_of(pair, named)
        clean, stamped = outputs[pair.name].float().chunk(2)
        mean, variance = clean.transpose(0, 1).flatten(1).mean(1), clean.transpose(0, 1).flatten(1).var(1, correction=0)
        kl = shift_of(mean, variance, affine)
        shifts.append((kl * DEFENDER / (DEFENDER + SHRINK))[chosen])
        gain = norm_scale(view.model, pair)
        act, shape = activation_of(pair), [1, -1, *[1] * (clean.ndim - 2)]
        # the affine map is detached: its size gets its gradient by a factor that is one
        factor = (affine.scale * gain / gain.detach().clamp_min(TINY)).view(shape)
        offset = affine.shift.view(shape)
        change = act(stamped * factor + offset) - act(clean * factor + offset)
        answers.append(standardize(change.flatten(2).norm(dim=2).mean(0))[chosen].relu())
    bound = CHANCE / (DEFENDER + SHRINK)
    return torch.cat(answers).mean().float() + (torch.cat(shifts) / bound).log1p().mean()


PENALTIES: dict[str, Callable[[View], Tensor]] = {"default": against_default, "lipschitz": against_weights}


def conv_outputs(model: nn.Module, pairs: tuple[ConvBN, ...], images: Tensor) -> dict[str, Tensor]:
    """What the convolutions of all pairs answer in evaluation mode; gradients as the caller has them.

    Args:
        model: The network; its mode is restored.
        pairs: Its pairs.
        images: ``[n, 3, h, w]``.

    Returns:
        Convolution → ``[n, out, …]``.
    """
    maps: dict[str, Tensor] = {}

    def seer(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def see(module: nn.Module, args: Any, output: Tensor) -> None:
            maps[name] = output

        return see

    handles = [model.get_submodule(pair.name).register_forward_hook(seer(pair.name)) for pair in pairs]
    try:
        with in_mode(model, False):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def norm_scale(model: nn.Module, pair: ConvBN) -> Tensor:
    """``max |γ|/√(σ²+ε)`` over the batch norms that read a filter, ``[out]``; γ keeps its gradient.

    Args:
        model: The network.
        pair: A convolution with the batch norms that read it.

    Returns:
        ``[out]``, not negative.
    """
    named = named_tensors(model)
    weight: Any = model.get_submodule(pair.name).weight
    scale = torch.zeros(pair.out_channels, device=weight.device)
    for reader in pair.readers:
        assert reader.norm.weight and reader.norm.variance
        channels = torch.from_numpy(reader.channels).to(weight.device)
        gain = named[reader.norm.weight][channels].abs()
        gain = gain / (named[reader.norm.variance][channels] + reader.norm.eps).sqrt()
        spread = torch.zeros_like(scale).index_put((torch.from_numpy(reader.filters).to(weight.device),), gain)
        scale = torch.maximum(scale, spread)
    return scale


def spectral_bound(model: nn.Module, pair: ConvBN) -> Tensor:
    """``scoring.statistics``' ``spectral`` with a gradient: ``σ_max(W[o]) · |γ|/√(σ²+ε)``, ``[out]``.

    Args:
        model: The network.
        pair: A convolution with its batch norms.

    Returns:
        ``[out]``, with a gradient to the weights.
    """
    module: Any = model.get_submodule(pair.name)
    matrix = _filters(model, pair.name, module.weight).flatten(2)  # (out, in/groups, kh·kw)
    if matrix.shape[1] < matrix.shape[2]:
        matrix = matrix.transpose(1, 2)
    gram = matrix.transpose(1, 2) @ matrix
    norms = gram.flatten().sqrt() if gram.shape[-1] == 1 else torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0).sqrt()
    return norms * norm_scale(model, pair)
