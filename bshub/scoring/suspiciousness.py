"""Statistics of a layer → suspiciousness of its filters. Higher = remove.

``SCORES`` is the whole registry: a score is one function ``PairStatistics → [out_channels]`` and one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bshub.errors import UsageError, choices
from bshub.scoring.statistics import PairStatistics

TINY = 1e-12


def bss(statistics: PairStatistics) -> Tensor:
    """Backdoor suspiciousness score, arXiv 2311.07417 (*reconstruction*: its equation 6 is not available to us).

    ``√spectral · (1 - correlation) / ((1 + activation/mean) · (1 + saliency/mean))``: suspicious is a filter
    that could amplify much, moves alone, and yet stays quiet and matters little on clean images. The two means
    are the layer's, so a dead filter's denominator is 1, never 0.

    Args:
        statistics: Of one layer, ``[out_channels]`` each.

    Returns:
        ``[out_channels]``.

    Raises:
        UsageError: There are no clean images.
    """
    correlation, activation, saliency = _need(statistics, "correlation", "activation", "saliency")
    return statistics.spectral.sqrt() * (1 - correlation) / ((1 + _relative(activation)) * (1 + _relative(saliency)))


def clp(statistics: PairStatistics) -> Tensor:
    """Channel Lipschitz bound alone, arXiv 2208.03111; needs no images.

    Args:
        statistics: Of one layer, ``[out_channels]`` each.

    Returns:
        ``[out_channels]``.
    """
    return statistics.spectral


def lipschitz(statistics: PairStatistics) -> Tensor:
    """``√spectral``: the paper's first term alone. The root keeps one huge filter from hiding the others of its layer.

    Args:
        statistics: Of one layer, ``[out_channels]`` each.

    Returns:
        ``[out_channels]``.
    """
    return statistics.spectral.sqrt()


def lone(statistics: PairStatistics) -> Tensor:
    """``√spectral · (1 - correlation)``: strong and unlike the rest of the layer.

    Args:
        statistics: Of one layer, ``[out_channels]`` each.

    Returns:
        ``[out_channels]``.

    Raises:
        UsageError: There are no clean images.
    """
    (correlation,) = _need(statistics, "correlation")
    return statistics.spectral.sqrt() * (1 - correlation)


def dormant(statistics: PairStatistics) -> Tensor:
    """``√spectral / activation``: strong but quiet on clean images.

    Args:
        statistics: Of one layer, ``[out_channels]`` each.

    Returns:
        ``[out_channels]``.

    Raises:
        UsageError: There are no clean images.
    """
    (activation,) = _need(statistics, "activation")
    return statistics.spectral.sqrt() / (activation + 1e-3 * activation.mean() + TINY)


def bn_shift(statistics: PairStatistics) -> Tensor:
    """``KL(N(mean z, var z) ‖ N(μ, σ²))``: how far the clean images are from the batch norm's running statistics.

    Args:
        statistics: Of one layer, ``[out_channels]`` each.

    Returns:
        ``[out_channels]``.

    Raises:
        UsageError: There are no clean images.
    """
    (shift,) = _need(statistics, "bn_shift")
    return shift


def tac(statistics: PairStatistics) -> Tensor:
    """Trigger-activated change of arXiv 2208.03111 under the inverted trigger: ``mean ‖a(x + trigger) - a(x)‖₂``.

    Args:
        statistics: Of one layer, ``[out_channels]`` each.

    Returns:
        ``[out_channels]``.

    Raises:
        UsageError: There are no clean images.
    """
    (change,) = _need(statistics, "tac")
    return change


@dataclass(frozen=True)
class Score:
    """A score and what it needs: clean images, an inverted trigger."""

    function: Callable[[PairStatistics], Tensor]
    needs_images: bool
    needs_trigger: bool = False


SCORES: dict[str, Score] = {
    "tac": Score(tac, needs_images=True, needs_trigger=True),
    "bss": Score(bss, needs_images=True),
    "clp": Score(clp, needs_images=False),
    "lipschitz": Score(lipschitz, needs_images=False),
    "lone": Score(lone, needs_images=True),
    "dormant": Score(dormant, needs_images=True),
    "bn-shift": Score(bn_shift, needs_images=True),
}


def find_score(name: str) -> Score:
    """Look a score up.

    Args:
        name: Key of ``SCORES``.

    Returns:
        The score.

    Raises:
        UsageError: There is no such score.
    """
    if name not in SCORES:
        raise UsageError(f"unknown score {name!r}", hint=choices(name, SCORES))
    return SCORES[name]


def _relative(values: Tensor) -> Tensor:
    return values / values.mean().clamp_min(TINY)


def _need(statistics: PairStatistics, *names: str) -> list[Tensor]:
    found = [getattr(statistics, name) for name in names]
    if any(value is None for value in found):
        raise UsageError("this score needs clean images", hint="give --clean-dir, or --score lipschitz")
    return found
