"""Are the triggers that were found backdoors? Questions that the size of a gap does not answer.

Does a trigger show the network what real images of its class show it? Then it is the natural way to that class
(``likeness.py``). Of a change of a few places, which finds such ways most, that is held possible too where there are
too few images of the class to tell, unless batch norm speaks for a backdoor, or it could be unlearned at little cost
(``repair/trial.py``). And does it pass through the filters that batch norm remembers?

Where a backdoor was planted with enough images, both looks see it: the search inverts a trigger, and batch norm
remembers the filters that answer to the real one. Then the inverted trigger excites these filters more than the others
of their layers: 1.5 to 4.6 deviations above their means, in the models that this was chosen on. A weakness that any
network may have mostly does not. A wide gap counts by itself: there may be another backdoor, planted with fewer images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from bshub.device import in_bf16
from bshub.graph.pairs import Pairing
from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.likeness import LIKE, NATURAL, likeness
from bshub.scoring.response import strongest, trigger_response
from bshub.scoring.selection import standardize
from bshub.scoring.shifted import Shifted
from bshub.scoring.shortcut import GAP_MADE_UP, Shortcut

SHOWN = 256  # images that the answer to a trigger is averaged over
PASSES = 1.0  # deviations from which a trigger passes through these filters
UNDOUBTED = GAP_MADE_UP  # a gap that innocent networks do not reach, on whatever images
UNSEEN = 3.0  # a gap from which a few places count with too few images to see a natural way: those came to 2.7
COST = 0.2  # nats up to which unlearning is cheap: 10 of 11 backdoors came to 0.07 to 0.19, 16 natural ways to 0.20 on


def confirm(
    model: nn.Module,
    pairing: Pairing,
    images: Tensor,
    labels: Tensor,
    shortcut: Shortcut,
    shifted: Shifted | None,
    made_up: bool = False,
    cost: Callable[[InvertedTrigger], float] | None = None,
    half: bool = False,
) -> tuple[Shortcut, dict[str, Tensor]]:
    """Keep the triggers that are no natural way to their class and pass through the filters that lie off, if any do.

    Args:
        model: In evaluation mode, nothing removed.
        pairing: Its pairs.
        images: Clean, ``[n, c, h, w]``.
        labels: ``[n]``.
        shortcut: What the search came to.
        shifted: What batch norm remembers.
        made_up: Whether the images only stand in for real ones, and show no class.
        cost: What it would cost to unlearn a trigger, in nats; asked where nothing else tells.
        half: Whether to compute in bfloat16.

    Returns:
        The same without the triggers in doubt and the natural ones, and how each filter answers to those that are
        left, the largest of several: convolution → ``[out_channels]``, empty without a trigger.
    """
    kept: list[tuple[InvertedTrigger, dict[str, Tensor]]] = []
    shown = images[:SHOWN], labels[:SHOWN]
    memory = shifted if shifted is not None and shifted.count else None
    doubted, natural, apart = [], [], False
    for trigger in shortcut.triggers:
        gap = shortcut.gaps[trigger.family]
        asked = not made_up and gap < NATURAL  # beyond that gap likeness is no excuse, and need not be measured
        with in_bf16(images.device, half):
            like = likeness(model, pairing, images, labels, trigger) if asked else None
        if like is not None and like >= LIKE:
            natural.append(trigger)
            continue
        with in_bf16(images.device, half):
            response = trigger_response(model, pairing, *shown, trigger)
        passes = memory is not None and passes_through(memory, response) >= PASSES
        untold = asked and like is None and trigger.local and gap < UNSEEN  # there are too few images to tell
        if untold and not passes and (cost is None or cost(trigger) > COST):
            natural.append(trigger)
            continue
        passes_by = memory is not None and not passes
        if passes_by and gap < UNDOUBTED:
            doubted.append(trigger)
            continue
        kept.append((trigger, response))
        apart |= passes_by
    left = replace(
        shortcut,
        triggers=tuple(trigger for trigger, _ in kept),
        doubted=tuple(doubted),
        natural=tuple(natural),
        apart=apart,
    )
    return left, strongest([response for _, response in kept])


def passes_through(shifted: Shifted, response: Mapping[str, Tensor]) -> float:
    """How far the filters that lie off stand above their layers in the answer to a trigger.

    Args:
        shifted: With at least one such filter.
        response: Convolution → answer, ``[out_channels]``.

    Returns:
        The mean over these filters, in deviations from their layer's mean.
    """
    found = [standardize(response[name])[shift > shifted.bound] for name, shift in shifted.shifts.items()]
    return float(torch.cat(found).mean())
