"""Looking at a model without touching it: trace, pair, measure, score, choose the threshold, plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bshub.clean import CleanImages
from bshub.device import in_bf16
from bshub.errors import InconclusiveError
from bshub.evaluation.metrics import Rate, clean_accuracy
from bshub.graph.coupling import ChannelFlow, follow_channels
from bshub.graph.pairs import Pairing, find_pairs
from bshub.graph.trace import Recording
from bshub.parallel import Workers
from bshub.progress import Steps
from bshub.repair.trial import cost_of_unlearning
from bshub.scoring.confirmation import confirm
from bshub.scoring.plan import RemovalPlan, as_arrays, make_plan
from bshub.scoring.recall import recall
from bshub.scoring.selection import MU_HIGH, MU_NOTHING, Threshold, flag, standardize
from bshub.scoring.shifted import Shifted, shifted_filters
from bshub.scoring.shortcut import GAP, GAP_MADE_UP, Shortcut, find_shortcut, total_steps
from bshub.scoring.shrink import Shrink
from bshub.scoring.statistics import PairStatistics, measure
from bshub.scoring.suspiciousness import find_score
from bshub.settings import Settings
from bshub.yardstick import FOREIGN, MADE_UP, Yardstick, affordable_mu, affordable_shrink, make_yardstick

WEIGHTS_ONLY_SCORE = "lipschitz"
WEIGHTS_ONLY_MU = 3.0  # CLP's own value
SHIFTED = "bn-shift"  # the score where only batch norm remembers a trigger


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
        shifted: The filters whose batch norm remembers other images; None where that was not looked at.
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
    shifted: Shifted | None = None

    @property
    def flags_shifted(self) -> bool:
        """Whether filters were flagged because their batch norm remembers other images."""
        return self.score == SHIFTED or (self.shortcut is not None and self.shortcut.apart)

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
            "shifted": None if self.shifted is None else {**self.shifted.as_dict(), "flagged": self.flags_shifted},
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
    real = clean is not None and not clean.made_up
    shrinks, looks = real and settings.shrink > 0, real and asks_trigger
    streams = shrinks or looks or (find_score(name).needs_images and not asks_trigger)
    stream = clean.stream() if clean is not None and streams else None
    with steps.step("statistics", clean.total if clean is not None and stream else None) as advance:
        statistics = measure(model, pairing, stream, taylor=shrinks, workers=workers, progress=advance)
    rate, yardstick, shifted, shortcut = None, None, None, None
    half = settings.precision == "bf16"
    if clean is not None:
        clean.drain()
        clean.join()
        rate = clean_accuracy(model, clean.batches(settings.batch_size))
        if rate.value < FOREIGN:
            warnings.append(
                f"the model is right on only {100 * rate.value:.0f} % of the clean images: are folders, labels "
                "and preprocessing those of the model?"
            )
        yardstick = make_yardstick(model, flow, pairing, clean, rate, settings.budget, settings.batch_size)
        if looks:
            with in_bf16(clean.images.device, half):
                shifted = _shifted(statistics, len(clean.labels), yardstick)
        if asks_trigger:
            with steps.step("trigger inversion", total_steps(clean.classes)) as advance:
                least = GAP_MADE_UP if clean.made_up else GAP
                found = find_shortcut(model, clean.images, clean.labels, settings.seed, advance, least, half)
                shown = clean.images, clean.labels
                shortcut, response = confirm(
                    model, pairing, *shown, found, shifted, clean.made_up,
                    lambda trigger: cost_of_unlearning(model, trigger, *shown, settings.seed, half), half,
                )  # fmt: skip
                alike = shifted is not None and bool(shifted.shifts)  # else batch norm remembers other images anyway
                if alike and shortcut.searched and not shortcut.triggers:
                    shortcut, response = recall(model, pairing, *shown, shortcut, settings.seed, advance, half)
            # a made-up image that is answered with the target may show the backdoor at work
            if clean.made_up and shortcut.triggers and clean.leave_out(shortcut.targets):
                rate = clean_accuracy(model, clean.batches(settings.batch_size))
                points = MADE_UP * settings.budget
                yardstick = make_yardstick(model, flow, pairing, clean, rate, points, settings.batch_size)
            with in_bf16(clean.images.device, half):
                explained = _explained(shortcut, shifted, yardstick, clean)
            name, statistics = _answered(name, shortcut, explained, response, statistics, warnings)
    with steps.step("threshold"):
        scores = _scores(name, pairing, statistics, shortcut, shifted)
        with in_bf16(next(model.parameters()).device, half):
            threshold = _threshold(scores, clean, yardstick, shortcut, shifted, name, settings)
        flagged = flag(pairing.pairs, scores, threshold.mu)
        plan, shrink = make_plan(flow, pairing, flagged), None
    if settings.shrink and not shrinks:
        warnings.append("without clean images no filter can be called useless: --shrink does nothing")
    elif settings.shrink and yardstick is not None:
        with steps.step("shrink"):
            shrink = affordable_shrink(yardstick, statistics, plan, settings.shrink)
            plan = make_plan(flow, pairing, flagged, spare=as_arrays(shrink.filters))
    return Diagnosis(
        flow, pairing, name, scores, threshold, plan, recording, rate, tuple(warnings), shrink, shortcut, shifted
    )


def _shifted(statistics: dict[str, PairStatistics], images: int, yardstick: Yardstick) -> Shifted:
    """What batch norm remembers beside the clean images, as far as its loss can be afforded."""
    found = shifted_filters(statistics, images)
    return found.raised(lambda tried: not yardstick.affords(_plan_of(tried, yardstick)))


def _plan_of(shifted: Shifted, yardstick: Yardstick) -> RemovalPlan:
    scores = {name: shifted.suspiciousness(name) for name in shifted.shifts}
    return make_plan(yardstick.flow, yardstick.pairing, flag(yardstick.pairing.pairs, scores, MU_HIGH))


def _explained(shortcut: Shortcut, shifted: Shifted | None, yardstick: Yardstick, clean: CleanImages) -> bool:
    """Whether nothing is left to do once the filters that batch norm remembers are gone."""
    if shifted is None or not shifted.count:
        return False
    if not shortcut.triggers:
        return True
    return not shortcut.apart and yardstick.disarms(_plan_of(shifted, yardstick), shortcut.triggers, clean)


def _answered(
    name: str,
    shortcut: Shortcut,
    explained: bool,
    response: dict[str, Tensor],
    statistics: dict[str, PairStatistics],
    warnings: list[str],
) -> tuple[str, dict[str, PairStatistics]]:
    """The score that can be used, and the statistics with how the filters answer to what was found."""
    if explained:
        return SHIFTED, statistics
    if not shortcut.searched:
        warnings.append(f"{shortcut.reason()}: the score {WEIGHTS_ONLY_SCORE!r} is used instead of {name!r}")
    if not shortcut.triggers:
        return WEIGHTS_ONLY_SCORE, statistics
    return name, {layer: replace(found, tac=response[layer]) for layer, found in statistics.items()}


def _scores(
    name: str,
    pairing: Pairing,
    statistics: dict[str, PairStatistics],
    shortcut: Shortcut | None,
    shifted: Shifted | None,
) -> dict[str, Tensor]:
    """Deviations from the layer's mean; with what batch norm remembers above every μ where that is something else."""
    if shifted is not None and name == SHIFTED:
        return {pair.name: shifted.suspiciousness(pair.name) for pair in pairing.pairs}
    score = find_score(name)
    scores = {pair.name: standardize(score.function(statistics[pair.name])) for pair in pairing.pairs}
    if shifted is None or shortcut is None or not shortcut.apart:
        return scores
    return {layer: shifted.raise_over(layer, found) for layer, found in scores.items()}


def _threshold(
    scores: dict[str, Tensor],
    clean: CleanImages | None,
    yardstick: Yardstick | None,
    shortcut: Shortcut | None,
    shifted: Shifted | None,
    name: str,
    settings: Settings,
) -> Threshold:
    if settings.mu != "auto":
        return Threshold(float(settings.mu), "given")
    if shifted is not None and name == SHIFTED:
        return Threshold(MU_HIGH, shifted.reason())
    triggers = shortcut.triggers if shortcut is not None else ()
    if shortcut is not None and shortcut.searched and not triggers:
        return Threshold(MU_NOTHING, shortcut.reason())
    if clean is None or yardstick is None or (clean.made_up and not triggers):
        return Threshold(WEIGHTS_ONLY_MU, "without clean images the usual value")
    return affordable_mu(yardstick, scores, clean, shortcut)
