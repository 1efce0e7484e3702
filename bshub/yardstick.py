"""What pruning may cost on the clean images, and what is chosen by it: μ, and the share of useless filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from bshub.clean import CleanImages
from bshub.evaluation.metrics import Rate, clean_accuracy
from bshub.graph.coupling import ChannelFlow
from bshub.graph.pairs import Pairing
from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.plan import RemovalPlan, as_arrays, make_plan
from bshub.scoring.selection import Threshold, choose_mu, flag
from bshub.scoring.shortcut import Shortcut
from bshub.scoring.shrink import Shrink, choose_share
from bshub.scoring.statistics import PairStatistics
from bshub.scoring.usefulness import spare_order, taken
from bshub.surgery.remove import silence

FOREIGN = 0.5  # clean accuracy below which the images probably are not the model's
MADE_UP = 10.0  # points of agreement on made-up images for one of accuracy: 15 to 30 went where accuracy lost 2 to 3
FAILS = 0.1  # success of an inverted trigger on the clean images, up to which it does not work any more


@dataclass(frozen=True)
class Yardstick:
    """What pruning is measured by.

    Attributes:
        model: The untouched network.
        flow: Its channels.
        pairing: Its conv-BN pairs.
        batches: Images with the answers to keep.
        before: How many of these answers the untouched network gives, 0 to 1.
        measured: What that share is, in words.
        points: Of it that may be lost.
    """

    model: nn.Module
    flow: ChannelFlow
    pairing: Pairing
    batches: list[tuple[Tensor, Tensor]]
    before: float
    measured: str
    points: float

    @property
    def allowed(self) -> float:
        """Points that may be lost: at least those of one image, or ten images would forbid everything."""
        return max(self.points, 100 / sum(len(labels) for _, labels in self.batches))

    def kept(self, plan: RemovalPlan) -> float:
        """The share of the answers that the network gives without the filters of a plan."""
        return clean_accuracy(silence(self.model, plan), self.batches).value

    def disarms(self, plan: RemovalPlan, triggers: Sequence[InvertedTrigger], clean: CleanImages) -> bool:
        """Whether every inverted trigger fails on the network without the filters of a plan."""
        return _fail(silence(self.model, plan), triggers, clean)

    def affords(self, plan: RemovalPlan) -> bool:
        """Whether no more is lost than may be."""
        return self.kept(plan) >= self.before - self.allowed / 100 - 1e-9


def make_yardstick(
    model: nn.Module, flow: ChannelFlow, pairing: Pairing, clean: CleanImages, rate: Rate, budget: float, size: int
) -> Yardstick:
    """Accuracy on the clean images, or agreement with the untouched network where there is little of it.

    Args:
        model: The untouched network.
        flow: Its channels.
        pairing: Its conv-BN pairs.
        clean: The images.
        rate: The network's accuracy on them.
        budget: Points that may be lost.
        size: Images per batch.

    Returns:
        The yardstick.
    """
    batches, before, accurate = clean.batches(size), rate.value, rate.value >= FOREIGN
    if not clean.made_up and not accurate:  # too low to lose much: hold on to the model's own answers instead
        with torch.no_grad():
            batches, before = [(images, model(images).argmax(1)) for images, _ in batches], 1.0
    measured = "accuracy" if accurate and not clean.made_up else "agreement with the original"
    return Yardstick(model, flow, pairing, batches, before, measured, budget)


def affordable_mu(
    yardstick: Yardstick, scores: dict[str, Tensor], clean: CleanImages, shortcut: Shortcut | None
) -> Threshold:
    """The μ that the clean images allow; the real trigger is not involved.

    Args:
        yardstick: What may be lost.
        scores: Convolution → deviations from the layer's mean, ``[out_channels]``.
        clean: The images that inverted triggers are tried on.
        shortcut: The inverted triggers; once all fail, nothing more need be removed.

    Returns:
        The threshold.
    """
    triggers = shortcut.triggers if shortcut is not None else ()

    @lru_cache(maxsize=1)  # both questions are asked of one μ after the other
    def pruned_at(mu: float) -> tuple[int, nn.Module]:
        plan = make_plan(yardstick.flow, yardstick.pairing, flag(yardstick.pairing.pairs, scores, mu))
        flagged = plan.counts()["flagged"]
        return flagged, silence(yardstick.model, plan) if flagged else yardstick.model

    def accuracy_at(mu: float) -> tuple[int, float]:
        flagged, pruned = pruned_at(mu)
        return flagged, clean_accuracy(pruned, yardstick.batches).value

    def fails(mu: float) -> bool:
        _, pruned = pruned_at(mu)
        return _fail(pruned, triggers, clean)

    return choose_mu(accuracy_at, yardstick.before, yardstick.allowed, yardstick.measured, fails if triggers else None)


def _fail(model: nn.Module, triggers: Sequence[InvertedTrigger], clean: CleanImages) -> bool:
    return all(trigger.success(model, clean.images, clean.labels) <= FAILS for trigger in triggers)


def affordable_shrink(
    yardstick: Yardstick, statistics: dict[str, PairStatistics], suspicious: RemovalPlan, share: float
) -> Shrink:
    """The useless filters that leave beside the suspicious ones.

    Args:
        yardstick: What may be lost.
        statistics: With the filters' usefulness.
        suspicious: What leaves anyway.
        share: The largest share of all filters that is asked for.

    Returns:
        The filters and what was tried.
    """
    flow, pairing = yardstick.flow, yardstick.pairing
    flagged = as_arrays(suspicious.flagged)
    order = spare_order(flow, pairing, statistics, suspicious.flagged)

    def accuracy_at(share: float) -> tuple[dict[str, list[int]], float]:
        plan = make_plan(flow, pairing, flagged, spare=taken(order, share * pairing.filters))
        return plan.spare, yardstick.kept(plan)

    return choose_share(accuracy_at, share, pairing.filters, yardstick.before, yardstick.allowed, yardstick.measured)
