"""Do the triggers that were found pass through the filters that batch norm remembers?

Where a backdoor was planted with enough images, both looks see it: the search inverts a trigger, and batch norm
remembers the filters that answer to the real one. Then the inverted trigger excites these filters more than the others
of their layers: 1.5 to 4.6 deviations above their means, in the models that this was chosen on. A weakness that any
network may have mostly does not. A wide gap counts by itself: there may be another backdoor, planted with fewer images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from bshub.graph.pairs import Pairing
from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.response import strongest, trigger_response
from bshub.scoring.selection import standardize
from bshub.scoring.shifted import Shifted
from bshub.scoring.shortcut import GAP_MADE_UP, Shortcut

PASSES = 1.0  # deviations from which a trigger passes through these filters
UNDOUBTED = GAP_MADE_UP  # a gap that innocent networks do not reach, on whatever images


def confirm(
    model: nn.Module, pairing: Pairing, images: Tensor, labels: Tensor, shortcut: Shortcut, shifted: Shifted | None
) -> tuple[Shortcut, dict[str, Tensor]]:
    """Keep the triggers that pass through the filters that lie off; all, where none lies off.

    Args:
        model: In evaluation mode, nothing removed.
        pairing: Its pairs.
        images: Clean, ``[n, c, h, w]``.
        labels: ``[n]``.
        shortcut: What the search came to.
        shifted: What batch norm remembers.

    Returns:
        The same without the triggers in doubt, and how each filter answers to those that are left, the largest of
        several: convolution → ``[out_channels]``, empty without a trigger.
    """
    kept: list[tuple[InvertedTrigger, dict[str, Tensor]]] = []
    doubted, apart = [], False
    for trigger in shortcut.triggers:
        response = trigger_response(model, pairing, images, labels, trigger)
        passes_by = shifted is not None and shifted.count > 0 and passes_through(shifted, response) < PASSES
        if passes_by and shortcut.gaps[trigger.family] < UNDOUBTED:
            doubted.append(trigger)
            continue
        kept.append((trigger, response))
        apart |= passes_by
    left = replace(shortcut, triggers=tuple(trigger for trigger, _ in kept), doubted=tuple(doubted), apart=apart)
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
