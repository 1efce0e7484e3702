"""Did batch norm see something in training that the clean images do not show?

Running statistics are means over the training images. Where a tenth of these carried a trigger, the filters that answer
to it remember them, and the clean images lie off: ``KL(clean ‖ running)`` of such a filter is many times what drawing
few images explains (the observation of BNP, Zheng et al., NeurIPS 2022, used here to decide and not only to rank).
A sinusoid over the whole image is seen this way, which no search for a small change can tell from an innocent one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bshub.scoring.statistics import PairStatistics

CHANCE = 4.0  # over (images + 32): nats that innocent networks stay under; 2.6 was the most that was seen
FLOOR = 0.02  # however many images there are: training images are augmented
FOREIGN_SHARE = 0.2  # of that bound: where half of all filters lie off by more, these are images of another kind


def shifted_filters(statistics: Mapping[str, PairStatistics], images: int) -> tuple[int, float, float]:
    """Count the filters whose statistics lie further off than chance explains.

    Args:
        statistics: With ``bn_shift``, ``[out_channels]`` each.
        images: Clean images that they were measured on.

    Returns:
        The number, the largest ``KL`` in nats and the bound. The number is 0 where the images are of another kind than
        the training images, so that every filter lies off.
    """
    shifts = [found.bn_shift.flatten() for found in statistics.values() if found.bn_shift is not None]
    bound = max(FLOOR, CHANCE / (images + 32))
    if not shifts:
        return 0, 0.0, bound
    every = torch.cat(shifts)
    foreign = float(every.median()) > FOREIGN_SHARE * bound
    return 0 if foreign else int((every > bound).sum()), float(every.max()), bound


def shifted_words(count: int, most: float, bound: float) -> str:
    """For whoever reads the report.

    Args:
        count: Filters that lie off.
        most: The largest ``KL`` in nats.
        bound: What chance explains.

    Returns:
        A sentence.
    """
    return (
        f"something in the training images is missing in the clean ones: {count} filters lie off their batch norm's "
        f"statistics (KL up to {most:.2f}, chance explains {bound:.2f}), and are judged by that"
    )
