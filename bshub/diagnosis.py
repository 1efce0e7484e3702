"""Looking at a model without touching it: trace, pair, measure, score, choose the threshold, plan."""

from __future__ import annotations

from dataclasses import dataclass
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
from bshub.scoring.plan import RemovalPlan, make_plan
from bshub.scoring.selection import Threshold, choose_mu, flag, standardize
from bshub.scoring.statistics import measure
from bshub.scoring.suspiciousness import find_score
from bshub.settings import Settings
from bshub.surgery.remove import silence

FOREIGN = 0.5  # clean accuracy below which the images probably are not the model's
WEIGHTS_ONLY_SCORE = "lipschitz"
WEIGHTS_ONLY_MU = 3.0  # CLP's own value


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
            "threshold": self.threshold.as_dict(),
            "counts": self.plan.counts(),
            "flagged": self.plan.flagged,
            "warnings": list(self.warnings),
        }


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
        settings: Score, μ, budget, batch size.
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
    score = find_score(name)
    stream = clean.stream() if clean is not None and score.needs_images else None
    with steps.step("statistics", clean.total if clean is not None and stream else None) as advance:
        statistics = measure(model, pairing, stream, workers=workers, progress=advance)
    if clean is not None:
        clean.drain()
        clean.join()
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
        threshold = _threshold(model, flow, pairing, scores, clean, rate, settings)
        plan = make_plan(flow, pairing, flag(pairing.pairs, scores, threshold.mu))
    return Diagnosis(flow, pairing, name, scores, threshold, plan, recording, rate, tuple(warnings))


def _threshold(
    model: nn.Module,
    flow: ChannelFlow,
    pairing: Pairing,
    scores: dict[str, Tensor],
    clean: CleanImages | None,
    rate: Rate | None,
    settings: Settings,
) -> Threshold:
    if settings.mu != "auto":
        return Threshold(float(settings.mu), "given")
    if clean is None or rate is None:
        return Threshold(WEIGHTS_ONLY_MU, "without clean images the usual value")
    batches, before, measured = clean.batches(settings.batch_size), rate.value, "accuracy"
    if rate.value < FOREIGN:  # too low to lose much: hold on to the model's own answers instead
        with torch.no_grad():
            batches = [(images, model(images).argmax(1)) for images, _ in batches]
        before, measured = 1.0, "agreement with the original"

    def accuracy_at(mu: float) -> tuple[int, float]:
        plan = make_plan(flow, pairing, flag(pairing.pairs, scores, mu))
        flagged = plan.counts()["flagged"]
        pruned = silence(model, plan) if flagged else model
        return flagged, clean_accuracy(pruned, batches).value

    return choose_mu(accuracy_at, before, settings.budget, measured)
