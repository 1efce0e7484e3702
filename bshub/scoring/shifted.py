"""What batch norm remembers of the training images that the clean ones do not show.

Running statistics are means over the training images. Where a tenth of these carried a trigger, the filters that answer
to it remember them, and the clean images lie off: ``KL(clean ‖ running)`` of such a filter is many times what drawing
few images explains (the observation of BNP, Zheng et al., NeurIPS 2022, used here to decide and not only to rank).
It takes one pass and sees what no search for a small change can tell from an innocent one: a sinusoid over the whole
image. A trigger that one training image of a hundred carried is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bshub.scoring.selection import MU_HIGH
from bshub.scoring.statistics import PairStatistics

CHANCE = 4.0  # over (images + 32): nats that innocent networks stay under; 2.6 was the most that was seen
FLOOR = 0.02  # however many images there are: training images are augmented
FOREIGN_SHARE = 0.2  # of that bound: where half of all filters lie off by more, these are images of another kind
RAISES = 6  # how often the bound may be doubled where the filters above it cost more accuracy than is allowed


@dataclass(frozen=True)
class Shifted:
    """Filters whose statistics lie further off than chance explains.

    Attributes:
        shifts: Convolution → ``KL`` in nats, ``[out_channels]``; nothing where the images are of another kind.
        chance: What chance explains, in nats.
        bound: From where filters are flagged: ``chance``, or what it had to be raised to.
    """

    shifts: dict[str, Tensor]
    chance: float
    bound: float

    @property
    def count(self) -> int:
        """How many filters lie off."""
        return sum(int((shift > self.bound).sum()) for shift in self.shifts.values())

    def suspiciousness(self, name: str) -> Tensor:
        """``MU_HIGH · √(KL / bound)`` of a layer: whichever μ is tried, filters that lie off stand above it.

        The root, since ``KL`` grows with the square of a shift of the mean: the numbers are of a deviation's kind.

        Args:
            name: A convolution.

        Returns:
            ``[out_channels]``, float64.
        """
        return MU_HIGH * (self.shifts[name].double() / self.bound).clamp_min(0).sqrt()

    def raise_over(self, name: str, scores: Tensor) -> Tensor:
        """Another score of a layer, with the filters that lie off above every μ.

        Args:
            name: A convolution.
            scores: Deviations from the layer's mean, ``[out_channels]``.

        Returns:
            ``[out_channels]``, float64.
        """
        if name not in self.shifts:
            return scores
        return torch.where(self.shifts[name] > self.bound, scores.maximum(self.suspiciousness(name)), scores)

    def raised(self, costs_too_much: Callable[[Shifted], bool]) -> Shifted:
        """The lowest bound, of this and its doubles, that can be afforded.

        Args:
            costs_too_much: Whether the network without the filters that lie off loses more than is allowed.

        Returns:
            The same with that bound; with none of the filters where even the last costs too much.
        """
        tried = self
        for _ in range(RAISES):
            if not tried.count or not costs_too_much(tried):
                return tried
            tried = replace(tried, bound=2 * tried.bound)
        return replace(self, shifts={})

    def reason(self) -> str:
        """For whoever reads the report."""
        most = max(float(shift.max()) for shift in self.shifts.values())
        raised = "" if self.bound == self.chance else f", more than {self.bound:.2f} is flagged"
        return (
            f"something in the training images is missing in the clean ones: {self.count} filters lie off their batch "
            f"norm's statistics (KL up to {most:.2f}, chance explains {self.chance:.2f}{raised})"
        )

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return {"filters": self.count, "chance": self.chance, "bound": self.bound} | (
            {"reason": self.reason()} if self.count else {}
        )


def shifted_filters(statistics: Mapping[str, PairStatistics], images: int) -> Shifted:
    """Find the filters whose statistics lie further off than chance explains.

    Args:
        statistics: With ``bn_shift``, ``[out_channels]`` each.
        images: Clean images that they were measured on.

    Returns:
        The filters; none where the images are of another kind than the training images, so that every filter lies off.
    """
    shifts = {name: found.bn_shift.flatten() for name, found in statistics.items() if found.bn_shift is not None}
    bound = max(FLOOR, CHANCE / (images + 32))
    foreign = bool(shifts) and float(torch.cat(list(shifts.values())).median()) > FOREIGN_SHARE * bound
    return Shifted({} if foreign else shifts, bound, bound)
