"""Adaptive: a BadNets attacker who knows this project's scores and trains against one of them.

The open question of arXiv 2311.07417, and an own attack, not a published one. Before each epoch the channels that the
trigger changes most are found (the largest mean absolute change of the batch-normed map, per conv-BN pair); during the
epoch ``λ · penalty`` is added to the loss, where the penalty is what a defender would see of these channels
(``penalties.py``). The first epoch goes without: scores do not change with a layer's scale, so their slope is steep
while batch norms still start from zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bshub.errors import UsageError, choices
from bshub.evaluation.attacks.badnets import patch_trigger
from bshub.evaluation.attacks.interface import Attack, Setup, dirty_roles, stamp_with
from bshub.evaluation.attacks.penalties import PENALTIES, View, conv_outputs, norm_scale
from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import ConvBN, find_pairs

PROBES = 256  # training images on which the channels are found
SHOWN = 32  # of them in each penalty
EVERY = 4  # steps between two penalties; one costs more than a small network's step


def adaptive(setup: Setup, weight: float = 1.0, share: float = 0.1, score: str = "default") -> Attack:
    """BadNets with a penalty on the score of the triggered channels.

    Args:
        setup: The run.
        weight: λ.
        share: Share of each layer's channels that counts as triggered, at least one channel.
        score: Key of ``PENALTIES``: what the attacker hides from.

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
    if score not in PENALTIES:
        raise UsageError(f"the adaptive attack knows no score {score!r}", hint=choices(score, PENALTIES))
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
        channels = {name: change.topk(max(1, round(share * len(change)))).indices for name, change in changes.items()}
        seen["step"], seen["view"] = 0, View(model, seen["pairs"], channels, clean, stamped)

    def live(pixels: Tensor, roles: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | float]:
        seen["step"] += 1
        if "view" not in seen or seen["step"] % EVERY:
            return pixels, 0.0
        view: View = seen["view"]
        some = torch.randperm(len(view.clean), generator=generator)[:SHOWN].to(setup.device)
        shown = replace(view, clean=view.clean[some], stamped=view.stamped[some])
        return pixels, EVERY * weight * PENALTIES[score](shown)

    return Attack(
        trigger=lambda: trigger,
        roles=dirty_roles(setup),
        stamp=stamp_with(trigger),
        live=live,
        begin=begin,
        notes={"weight": weight, "share": share, "score": score},
    )


@torch.no_grad()
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
    before, after = (conv_outputs(model, pairs, images) for images in (clean, stamped))
    return {
        pair.name: (after[pair.name] - before[pair.name]).float().abs().flatten(2).mean((0, 2))
        * norm_scale(model, pair)
        for pair in pairs
    }
