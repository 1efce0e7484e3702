"""What an inverted trigger can still do to a network that it was not made for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bshub.clean import CleanImages
from bshub.graph.trace import in_mode
from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.statistics import asking_only

TRIES = 8  # steps that each trigger gets against the network
BATCH = 32


def held_against(model: nn.Module, triggers: Sequence[InvertedTrigger], clean: CleanImages) -> float:
    """Success of the triggers on the clean images of other classes, after each was sharpened against the network.

    Args:
        model: In evaluation mode; not changed.
        triggers: They stay as they are.
        clean: The clean images.

    Returns:
        The largest share of them all, 0 to 1; 0 without triggers.
    """
    worst = 0.0
    for trigger in triggers:
        others = clean.images[clean.labels != trigger.target]
        trying = trigger.copy()
        with in_mode(model, False), asking_only(model, []):
            for part in (others.split(BATCH) * TRIES)[:TRIES] if len(others) else ():
                trying.sharpen(model, part)
        worst = max(worst, trying.success(model, clean.images, clean.labels))
    return worst
