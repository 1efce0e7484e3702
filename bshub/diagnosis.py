"""Looking at a model without touching it: trace, pair, measure, score, choose the threshold, plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from bshub.clean import CleanImages
from bshub.errors import InconclusiveError
from bshub.evaluation.metrics import Rate, clean_accuracy
from bshub.graph.coupling import ChannelFlow, follow_channels
from bshub.graph.pairs import Pairing, find_pairs
from bshub.graph.trace import Recording
from bshub.parallel import Workers
from bshub.progress import Steps
from bshub.scoring.plan import RemovalPlan, as_arrays, make_plan
from bshub.scoring.response import trigger_response
from bshub.scoring.selection import MU_NOTHING, Threshold, choose_mu, flag, standardize
from bshub.scoring.shifted import shifted_filters, shifted_words
from bshub.scoring.shortcut import GAP, GAP_MADE_UP, Shortcut, find_shortcut, total_steps
from bshub.scoring.shrink import Shrink, choose_share
from bshub.scoring.statistics import PairStatistics, measure
from bshub.scoring.suspiciousness import find_score
from bshub.scoring.usefulness import spare_order, taken
from bshub.settings import Settings
from bshub.surgery.remove import silence

RESPONSE_IMAGES = 256  # that the answer to an inverted trigger is averaged over
FOREIGN = 0.5  # clean accuracy below which the images probably are not the model's
WEIGHTS_ONLY_SCORE = "lipschitz"
SHIFTED, SEEN_AT_ONCE = "bn-shift", 64  # the score where only batch norm remembers a trigger; images per run
WEIGHTS_ONLY_MU = 3.0  # CLP's own value
FAILS = 0.1  # success of an inverted trigger on the clean images, up to which it does not work any more


@dataclass(frozen=True)
class Diagnosis:
    """What looking at a model found.

    Attributes:
        flow: Channels and coupling groups.
        pairing: Conv-BN pairs.
        score: The score that was used.
        scores: Convolution → suspiciousness ``[out_channels]`` in deviations from the layer's mean.
        threshold: μ and how it came about.
        plan: What would be removed.
        recording: The recorded run.
        clean_accuracy: On the clean images; None without images.
        warnings: What a user should know.
        shrink: The useless filters that would leave too; None where none were to be looked for.
        shortcut: What the search for a trigger came to; None where none was to be looked for.
    """

    flow: ChannelFlow
    pairing: Pairing
    score: str
    scores: dict[str, Tensor]
    threshold: Threshold
    plan: RemovalPlan
    recording: Recording
    clean_accuracy: Rate | None
    warnings: tuple[str, ...]
    shrink: Shrink | None = None
    shortcut: Shortcut | None = None

    def most_suspicious(self, count: int) -> list[tuple[str, int, float]]:
        """The ``count`` flagged filters with the highest scores: (convolution, filter, score)."""
        found = [
            (name, index, float(self.scores[name][index]))
            for name, filters in self.plan.flagged.items()
            for index in filters
        ]
        return sorted(found, key=lambda item: -item[2])[:count]

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return {
            "filters": self.pairing.filters,
            "pairs": len(self.pairing.pairs),
            "unpaired": self.pairing.unpaired,
            "score": self.score,
            "inversion": None if self.shortcut is None else self.shortcut.as_dict(),
            "threshold": self.threshold.as_dict(),
            "counts": self.counts(self.plan),
            "flagged": self.plan.flagged,
            "warnings": list(self.warnings),
        }

    def counts(self, plan: RemovalPlan) -> dict[str, int]:
        """For reports: those of a plan, with those of the spare filters where any were to be looked for."""
        return ({} if self.shrink is None else {"spare": 0}) | plan.counts()

    def shrink_facts(self, plan: RemovalPlan) -> dict[str, Any]:
        """For reports: ``shrink`` with the spare filters of ``plan``; nothing where none were to be looked for."""
        return {"shrink": self.shrink.as_dict(plan.spare)} if self.shrink is not None else {}


def diagnose(
    model: nn.Module,
    input_size: tuple[int, int, int],
    clean: CleanImages | None,
    settings: Settings,
    steps: Steps,
    workers: Workers | None = None,
) -> Diagnosis:
    """Find suspicious filters.

    Args:
        model: The network, in evaluation mode on its device; not changed.
        input_size: ``(channels, height, width)``.
        clean: Clean images; None: the weights alone are judged.
        settings: Score, μ, budget, shrink, batch size.
        steps: Where the work is shown.
        workers: Processes that share the clean images; all come to the same diagnosis.

    Returns:
        The diagnosis.

    Raises:
        TraceError: The model does not run.
        InconclusiveError: There is no conv-BN pair.
    """
    with steps.step("trace"):
        flow, recording = follow_channels(model, input_size)
        pairing = find_pairs(model, flow)
    if not pairing.filters:
        raise InconclusiveError(
            "the model has no convolution followed by a batch norm: nothing can be examined",
            hint="bshub judges filters by their batch norm; networks without one are out of its reach",
        )
    if clean is not None:
        with torch.no_grad():
            clean.expect(model(clean.images[:2]).shape[-1])
    name, warnings = settings.score, []
    if flow.unseen:
        warnings.append(
            f"{len(flow.unseen)} parameters ({flow.unseen[0]}, …) are read by no run that could be recorded: "
            "a branch that uses them in training may not fit the narrowed network"
        )
    if clean is None and find_score(name).needs_images:
        warnings.append(f"without clean images the score {WEIGHTS_ONLY_SCORE!r} is used instead of {name!r}")
        name = WEIGHTS_ONLY_SCORE
    asks_trigger = find_score(name).needs_trigger
    shrinks = clean is not None and not clean.made_up and settings.shrink > 0
    streams = shrinks or (find_score(name).needs_images and not asks_trigger)
    stream = clean.stream() if clean is not None and streams else None
    with steps.step("statistics", clean.total if clean is not None and stream else None) as advance:
        statistics = measure(model, pairing, stream, taylor=shrinks, workers=workers, progress=advance)
    if clean is not None:
        clean.drain()
        clean.join()
    shortcut = None
    if clean is not None and asks_trigger:
        with steps.step("trigger inversion", total_steps(clean.classes)) as advance:
            least = GAP_MADE_UP if clean.made_up else GAP
            shortcut = find_shortcut(model, clean.images, clean.labels, settings.seed, advance, least)
        name, statistics = _answered(name, model, pairing, clean, shortcut, statistics, warnings)
    score = find_score(name)
    with steps.step("threshold"):
        scores = {pair.name: standardize(score.function(statistics[pair.name])) for pair in pairing.pairs}
        rate = None
        if clean is not None:
            rate = clean_accuracy(model, clean.batches(settings.batch_size))
            if rate.value < FOREIGN:
                warnings.append(
                    f"the model is right on only {100 * rate.value:.0f} % of the clean images: are folders, labels "
                    "and preprocessing those of the model?"
                )
        yardstick = _yardstick(model, clean, rate, settings)
        threshold = _threshold(model, flow, pairing, scores, clean, yardstick, shortcut, name, settings)
        flagged = flag(pairing.pairs, scores, threshold.mu)
        plan, shrink = make_plan(flow, pairing, flagged), None
    if settings.shrink and not shrinks:
        warnings.append("without clean images no filter can be called useless: --shrink does nothing")
    elif settings.shrink and yardstick is not None:
        with steps.step("shrink"):
            shrink = _shrink(model, flow, pairing, statistics, plan, yardstick, settings)
            plan = make_plan(flow, pairing, flagged, spare=as_arrays(shrink.filters))
    return Diagnosis(flow, pairing, name, scores, threshold, plan, recording, rate, tuple(warnings), shrink, shortcut)


def _answered(
    name: str,
    model: nn.Module,
    pairing: Pairing,
    clean: CleanImages,
    shortcut: Shortcut,
    statistics: dict[str, PairStatistics],
    warnings: list[str],
) -> tuple[str, dict[str, PairStatistics]]:
    """The score that can be used, and the statistics with how the filters answer to what was found."""
    if not shortcut.triggers:
        if not shortcut.searched:
            warnings.append(f"{shortcut.reason()}: the score {WEIGHTS_ONLY_SCORE!r} is used instead of {name!r}")
        elif not clean.made_up:
            streamed = all(found.bn_shift is not None for found in statistics.values())
            seen = statistics if streamed else measure(model, pairing, iter(clean.batches(SEEN_AT_ONCE)))
            count, most, bound = shifted_filters(seen, len(clean.labels))
            if count:
                warnings.append(shifted_words(count, most, bound))
                return SHIFTED, seen
        return WEIGHTS_ONLY_SCORE, statistics
    images, labels = clean.images[:RESPONSE_IMAGES], clean.labels[:RESPONSE_IMAGES]
    response = trigger_response(model, pairing, images, labels, shortcut.triggers)
    return name, {layer: replace(found, tac=response[layer]) for layer, found in statistics.items()}


@dataclass(frozen=True)
class _Yardstick:
    """What pruning is measured by: batches with the answers to keep, and how many of them the untouched model gives."""

    batches: list[tuple[Tensor, Tensor]]
    before: float
    measured: str

    def allowed(self, budget: float) -> float:
        """Points that may be lost: at least those of one image, or ten images would forbid everything."""
        return max(budget, 100 / sum(len(labels) for _, labels in self.batches))


def _yardstick(model: nn.Module, clean: CleanImages | None, rate: Rate | None, settings: Settings) -> _Yardstick | None:
    """None without clean images, or where nothing will be chosen by it."""
    if clean is None or rate is None or (settings.mu != "auto" and not settings.shrink):
        return None
    batches = clean.batches(settings.batch_size)
    if clean.made_up:
        return _Yardstick(batches, rate.value, "agreement with the original")
    if rate.value >= FOREIGN:
        return _Yardstick(batches, rate.value, "accuracy")
    with torch.no_grad():  # too low to lose much: hold on to the model's own answers instead
        answered = [(images, model(images).argmax(1)) for images, _ in batches]
    return _Yardstick(answered, 1.0, "agreement with the original")


def _threshold(
    model: nn.Module,
    flow: ChannelFlow,
    pairing: Pairing,
    scores: dict[str, Tensor],
    clean: CleanImages | None,
    yardstick: _Yardstick | None,
    shortcut: Shortcut | None,
    name: str,
    settings: Settings,
) -> Threshold:
    if settings.mu != "auto":
        return Threshold(float(settings.mu), "given")
    if shortcut is not None and shortcut.searched and not shortcut.triggers and name != SHIFTED:
        return Threshold(MU_NOTHING, shortcut.reason())
    triggers = shortcut.triggers if shortcut is not None else ()
    if clean is None or yardstick is None or (clean.made_up and not triggers):
        return Threshold(WEIGHTS_ONLY_MU, "without clean images the usual value")

    @lru_cache(maxsize=1)  # both questions are asked of one μ after the other
    def pruned_at(mu: float) -> tuple[int, nn.Module]:
        plan = make_plan(flow, pairing, flag(pairing.pairs, scores, mu))
        flagged = plan.counts()["flagged"]
        return flagged, silence(model, plan) if flagged else model

    def accuracy_at(mu: float) -> tuple[int, float]:
        flagged, pruned = pruned_at(mu)
        return flagged, clean_accuracy(pruned, yardstick.batches).value

    def fails(mu: float) -> bool:
        _, pruned = pruned_at(mu)
        return all(trigger.success(pruned, clean.images, clean.labels) <= FAILS for trigger in triggers)

    budget = yardstick.allowed(settings.budget)
    return choose_mu(accuracy_at, yardstick.before, budget, yardstick.measured, fails if triggers else None)


def _shrink(
    model: nn.Module,
    flow: ChannelFlow,
    pairing: Pairing,
    statistics: dict[str, PairStatistics],
    suspicious: RemovalPlan,
    yardstick: _Yardstick,
    settings: Settings,
) -> Shrink:
    flagged = as_arrays(suspicious.flagged)
    order = spare_order(flow, pairing, statistics, suspicious.flagged)

    def accuracy_at(share: float) -> tuple[dict[str, list[int]], float]:
        plan = make_plan(flow, pairing, flagged, spare=taken(order, share * pairing.filters))
        return plan.spare, clean_accuracy(silence(model, plan), yardstick.batches).value

    return choose_share(
        accuracy_at,
        settings.shrink,
        pairing.filters,
        yardstick.before,
        yardstick.allowed(settings.budget),
        yardstick.measured,
    )
