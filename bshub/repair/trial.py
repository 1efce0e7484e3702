"""What would it cost to unlearn a change? A backdoor can be taken from a network, a natural way to a class cannot.

A short stroke makes a 4 of most digits, because it is by this stroke that the network knows a 4: who unlearns it,
unlearns the class. A trigger shares nothing with what images show. So where a change may be either, it is unlearned on
a copy, as the repair would do it, and the copy is compared with the original on mixtures of the clean images, of which
there are as many as one likes: with one image per class nothing else can be counted.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bshub.device import in_bf16
from bshub.graph.trace import in_mode
from bshub.repair.finetune import FEW, Schedule, distil, repair
from bshub.repair.lesson import fresh_mixtures
from bshub.scoring.inversion import InvertedTrigger

RATE, BATCH = 0.002, 32  # of the repair by default: the bound of the cost was chosen with them
MIXTURES = 512  # that a copy is compared on
TRIALS = 2  # copies: with ten images one repair turns out differently from the next


def cost_of_unlearning(
    model: nn.Module, trigger: InvertedTrigger, images: Tensor, labels: Tensor, seed: int, half: bool = False
) -> float:
    """``KL(original ‖ copy that unlearned the trigger)`` of the softmax answers, mean over mixtures and copies.

    Args:
        model: In evaluation mode; not changed.
        trigger: With its strength; not changed.
        images: Clean, ``[n, c, h, w]``; fewer than ``FEW`` of them, spread over all, are used.
        labels: ``[n]``.
        seed: Of order, augmentation and mixtures.
        half: Whether to compute in bfloat16.

    Returns:
        Nats, from 0.
    """
    some = torch.linspace(0, len(images) - 1, min(len(images), FEW - 1)).round().long().to(images.device)
    costs = [_cost(model, trigger, images[some], labels[some], seed + trial, half) for trial in range(TRIALS)]
    return sum(costs) / TRIALS


def _cost(model: nn.Module, trigger: InvertedTrigger, images: Tensor, labels: Tensor, seed: int, half: bool) -> float:
    unlearned = copy.deepcopy(model)
    schedule = Schedule(1, RATE, BATCH, seed, "bf16" if half else "fp32")  # so many passes as the fewest steps need
    repair(unlearned, model, images, labels, {}, "distil", schedule, triggers=[trigger.copy()])
    total = 0.0
    with torch.no_grad(), in_mode(model, False), in_mode(unlearned, False), in_bf16(images.device, half):
        for mixtures, given in fresh_mixtures(images, labels, MIXTURES, BATCH, seed):
            total += float(distil(unlearned(mixtures).float(), given, model(mixtures).float()))
    return total / (MIXTURES // BATCH)
