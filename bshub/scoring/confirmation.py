"""Do the triggers that were found pass through the filters that batch norm remembers?

Where a backdoor was planted with enough images, both looks see it: the search inverts a trigger, and batch norm
remembers the filters that answer to the real one. Then the inverted trigger excites these filters more than the others
of their layers. A weakness that any network may have does not: of the cases that were looked at, true triggers stood
0.7 to 1.7 deviations above the layers' means there, false ones below them. A wide gap counts by itself: there may be
another backdoor, planted with fewer images.
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
from bshub.scoring.shortcut import Shortcut

UNDOUBTED = 2.25  # gap that innocent networks do not reach, on whatever images


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
    doubted = []
    for trigger in shortcut.triggers:
        response = trigger_response(model, pairing, images, labels, trigger)
        gap = shortcut.gaps[trigger.family]
        if shifted is None or not shifted.count or gap >= UNDOUBTED or passes_through(shifted, response) > 0:
            kept.append((trigger, response))
        else:
            doubted.append(trigger)
    left = replace(shortcut, triggers=tuple(trigger for trigger, _ in kept), doubted=tuple(doubted))
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
