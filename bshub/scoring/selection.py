"""Scores + threshold → flagged filters: ``mean + μ · std`` of each layer, with μ given or chosen on clean images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bshub.errors import InconclusiveError
from bshub.graph.channels import Ints
from bshub.graph.pairs import ConvBN

MU_HIGH, MU_LOW, MU_STEP = 6.0, 1.0, 0.25
MU_NOTHING = 1e6  # flags nothing: a score lies at most √(n - 1) deviations above the mean of n


@dataclass(frozen=True)
class Threshold:
    """The μ of a run and why.

    Attributes:
        mu: The multiplier.
        reason: How it was chosen, in words.
        curve: ``(μ, flagged filters, clean accuracy)`` of every candidate that was tried, by falling μ.
        floor: Lowest clean accuracy within the budget, 0 to 1, where there is a curve.
    """

    mu: float
    reason: str
    curve: tuple[tuple[float, int, float], ...] = ()
    floor: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)


def standardize(scores: Tensor) -> Tensor:
    """``(score - mean) / std`` within a layer; a layer whose scores are all equal gets zeros.

    Args:
        scores: ``[out_channels]``.

    Returns:
        ``[out_channels]``.

    Raises:
        InconclusiveError: A score is not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise InconclusiveError(
            "a filter's score is not finite: the weights overflow somewhere",
            hint="choose another --score: bshub scan --help lists them",
        )
    scores = scores.double()
    deviation = scores.std(correction=0)
    if deviation <= 1e-9 * scores.abs().max().clamp_min(1e-30):
        return torch.zeros_like(scores)
    return (scores - scores.mean()) / deviation


def flag(pairs: Sequence[ConvBN], standardized: Mapping[str, Tensor], mu: float) -> dict[str, Ints]:
    """Filters with a batch norm whose standardized score exceeds μ.

    Args:
        pairs: Conv-BN pairs.
        standardized: Convolution → deviations from the layer's mean, ``[out_channels]``.
        mu: Threshold μ, in deviations.

    Returns:
        Convolution → filter indices, only where there are any.
    """
    found: dict[str, Ints] = {}
    for pair in pairs:
        index = np.flatnonzero((standardized[pair.name].numpy() > mu) & pair.paired)
        if len(index):
            found[pair.name] = index
    return found


def choose_mu(
    accuracy_at: Callable[[float], tuple[int, float]],
    accuracy_before: float,
    budget: float,
    measured: str = "accuracy",
    enough: Callable[[float], bool] | None = None,
) -> Threshold:
    """The lowest μ whose pruned model stays within the budget on the clean images, or the highest that is enough.

    Candidates stand 0.25 apart from 6 down to 1. Pruning more costs more, so the border is bracketed by steps of
    1 downwards and then by 0.5 and 0.25 inside the bracket: about eight evaluations. The real trigger is not involved.

    Args:
        accuracy_at: μ → (flagged filters, accuracy of the pruned model on the clean images, 0 to 1).
        accuracy_before: The same of the untouched model.
        budget: Points of accuracy that may be lost.
        measured: What the accuracy is, for the reason.
        enough: Whether an inverted trigger fails on the pruned model of μ; more need not be removed then.

    Returns:
        The threshold with everything that was tried.
    """
    floor = accuracy_before - budget / 100 - 1e-9
    tried: dict[float, tuple[int, float]] = {}

    def good(mu: float) -> bool:
        tried[mu] = accuracy_at(mu)
        return tried[mu][1] >= floor

    best, bad, fails, step = math.inf, None, False, 1.0
    mu = MU_HIGH
    while mu >= MU_LOW and not fails:
        if not good(mu):
            bad = mu
            break
        fails = enough is not None and enough(mu)
        best, mu = mu, mu - step
    for step in (0.5, MU_STEP):
        if fails and enough is not None:  # back up, as far as it still fails
            middle = best + step
            best = middle if middle < MU_HIGH and good(middle) and enough(middle) else best
        elif bad is not None and best is not math.inf and best - step > bad and good(best - step):
            best -= step
            fails = enough is not None and enough(best)
    curve = tuple((mu, *tried[mu]) for mu in sorted(tried, reverse=True))
    loss = f"{budget:g} points of {measured}"
    if best is math.inf:
        return Threshold(
            MU_NOTHING,
            f"even μ = {MU_HIGH:g} costs more than {loss}: nothing is pruned",
            curve,
            floor,
        )
    if fails:
        return Threshold(best, f"the highest μ at which the inverted trigger fails, within {loss}", curve, floor)
    return Threshold(
        best,
        f"the lowest μ whose pruned model loses at most {loss} on the clean images",
        curve,
        floor,
    )
