"""Adaptive: a BadNets attacker who knows this project's default score and trains against it.

The open question of arXiv 2311.07417, and an own attack, not a published one. Before each epoch the channels that the
trigger changes most are found (the largest mean absolute change of the batch-normed map, per conv-BN pair); during the
epoch ``λ · mean relu(z)`` is added to the loss, where z is exactly the score that a defender would see of these
channels: ``lipschitz`` (√ of the channel's Lipschitz bound), standardised within its layer. The first epoch goes
without: z does not change with a layer's scale, so its slope is steep while batch norms still start from zero.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bshub.errors import UsageError
from bshub.evaluation.attacks.badnets import patch_trigger
from bshub.evaluation.attacks.interface import Attack, Setup, dirty_roles, stamp_with
from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import ConvBN, find_pairs
from bshub.graph.trace import in_mode
from bshub.scoring.selection import standardize
from bshub.scoring.statistics import PairStatistics, _filters
from bshub.scoring.suspiciousness import lipschitz

PROBES = 256  # training images on which the channels are found
FLOOR = 1e-3  # of the layer's mean, for the root's slope
EVERY = 4  # steps between two penalties; the eigenvalues cost more than a small network's step


def adaptive(setup: Setup, weight: float = 1.0, share: float = 0.1) -> Attack:
    """BadNets with a penalty on the score of the triggered channels.

    Args:
        setup: The run.
        weight: λ.
        share: Share of each layer's channels that counts as triggered, at least one channel.

    Returns:
        The attack on this run.

    Raises:
        UsageError: A hyper-parameter is out of its range, or the network has no filter to hide in.
    """
    if not (weight >= 0 and 0 < share <= 1):
        raise UsageError(
            "weight must not be negative, share must lie in (0, 1]",
            hint="leave --option away for the default; docs/attacks.md says what it does",
        )
    trigger = patch_trigger(setup.target, setup.size)
    chosen = torch.randperm(len(setup.labels), generator=setup.generator(3))[:PROBES]
    seen: dict[str, Any] = {"step": 0}

    def begin(model: nn.Module, epoch: int) -> None:
        if not epoch:
            return
        images = setup.read(chosen)
        clean, stamped = (setup.normalise(x.to(setup.device).float() / 255) for x in (images, trigger(images)))
        if "pairs" not in seen:
            flow, _ = follow_channels(model, (3, *setup.size))
            seen["pairs"] = find_pairs(model, flow).pairs
        changes = triggered_change(model, seen["pairs"], clean, stamped)
        seen["model"] = model
        seen["step"] = 0
        seen["channels"] = {
            name: change.topk(max(1, round(share * len(change)))).indices for name, change in changes.items()
        }

    def live(pixels: Tensor, roles: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | float]:
        seen["step"] += 1
        if "channels" not in seen or seen["step"] % EVERY:
            return pixels, 0.0
        return pixels, EVERY * weight * penalty(seen["model"], seen["pairs"], seen["channels"])

    return Attack(
        trigger=lambda: trigger,
        roles=dirty_roles(setup),
        stamp=stamp_with(trigger),
        live=live,
        begin=begin,
        notes={"weight": weight, "share": share, "score": "lipschitz"},
    )


def triggered_change(model: nn.Module, pairs: tuple[ConvBN, ...], clean: Tensor, stamped: Tensor) -> dict[str, Tensor]:
    """Trigger-activated change of every filter: ``|γ|/√(σ²+ε) · mean |z(stamped) - z(clean)|``.

    Args:
        model: The network; its mode is restored.
        pairs: Its conv-BN pairs.
        clean: ``(n, 3, H, W)``, normalised.
        stamped: The same images with the trigger.

    Returns:
        Convolution → ``[out]``, zero for filters without a batch norm.
    """
    maps: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        maps[name] = output.detach()

    handles = [model.get_submodule(pair.name).register_forward_hook(partial(see, pair.name)) for pair in pairs]
    try:
        with torch.no_grad(), in_mode(model, False):
            model(clean)
            before = dict(maps)
            model(stamped)
    finally:
        for handle in handles:
            handle.remove()
    return {
        pair.name: (maps[pair.name] - before[pair.name]).float().abs().flatten(2).mean((0, 2))
        * norm_scale(model, pair).detach()
        for pair in pairs
    }


def norm_scale(model: nn.Module, pair: ConvBN) -> Tensor:
    """``max |γ|/√(σ²+ε)`` over the batch norms that read a filter, ``[out]``; γ keeps its gradient.

    Args:
        model: The network.
        pair: A convolution with the batch norms that read it.

    Returns:
        ``[out]``, not negative.
    """
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
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


def penalty(model: nn.Module, pairs: tuple[ConvBN, ...], channels: dict[str, Tensor]) -> Tensor:
    """``mean relu(z)`` over the triggered channels of all layers, z the standardised default score.

    Args:
        model: The network, in training.
        pairs: Its conv-BN pairs.
        channels: Convolution → indices of the channels that the trigger moves, ``[k]``.

    Returns:
        A scalar with a gradient to the weights.
    """
    scores = []
    for pair in pairs:
        spectral = spectral_bound(model, pair)
        spectral = spectral.clamp_min(FLOOR * float(spectral.detach().mean()) + 1e-12)  # the root has no slope at zero
        z = standardize(lipschitz(PairStatistics(spectral)))
        scores.append(z[channels[pair.name]].relu())
    return torch.cat(scores).mean().float()
