"""How many useless filters leave: the largest share within the accuracy budget, found by bisection on clean images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STEPS = 32  # candidates: share · k/32


@dataclass(frozen=True)
class Shrink:
    """The spare filters of a run and why so many.

    Attributes:
        asked: Largest share of the filters with a batch norm that was to leave, 0 to 0.9.
        reason: How the share came about, in words.
        curve: ``(share, spare filters, clean accuracy)`` of every candidate that was tried, by rising share.
        floor: Lowest clean accuracy within the budget, 0 to 1, where there is a curve.
        filters: Convolution → spare filters; none of them is flagged.
        scored: Number of filters with a batch norm.
    """

    asked: float
    reason: str
    curve: tuple[tuple[float, int, float], ...] = ()
    floor: float | None = None
    filters: Mapping[str, Sequence[int]] = field(default_factory=dict)
    scored: int = 0

    def as_dict(self, filters: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
        """For reports.

        Args:
            filters: Those that really left, where some could not.

        Returns:
            ``asked``, ``reached``, ``reason``, ``curve``, ``floor`` and ``filters``.
        """
        filters = self.filters if filters is None else filters
        return {
            "asked": self.asked,
            "reached": sum(map(len, filters.values())) / max(self.scored, 1),
            "reason": self.reason,
            "curve": self.curve,
            "floor": self.floor,
            "filters": {name: list(index) for name, index in filters.items()},
        }


def choose_share(
    accuracy_at: Callable[[float], tuple[dict[str, list[int]], float]],
    asked: float,
    scored: int,
    accuracy_before: float,
    budget: float,
    measured: str = "accuracy",
) -> Shrink:
    """The largest share whose pruned model stays within the budget on the clean images.

    Candidates are ``asked · k/32``. The whole share is tried first, then nothing at all (the suspicious filters may
    have used the budget up), then the border between them is bisected: at most seven evaluations. No trigger is
    involved.

    Args:
        accuracy_at: Share → (convolution → spare filters, accuracy of the model without them and without the
            suspicious ones on the clean images, 0 to 1).
        asked: Largest share, above 0.
        scored: Number of filters with a batch norm.
        accuracy_before: Accuracy of the untouched model.
        budget: Points of accuracy that may be lost.
        measured: What the accuracy is, for the reason.

    Returns:
        The spare filters with everything that was tried.
    """
    floor = accuracy_before - budget / 100 - 1e-9
    tried: dict[int, tuple[dict[str, list[int]], float]] = {}

    def good(k: int) -> bool:
        tried[k] = accuracy_at(asked * k / STEPS)
        return tried[k][1] >= floor

    def count(k: int) -> int:
        return sum(map(len, tried[k][0].values()))

    def found(k: int, reason: str) -> Shrink:
        curve = tuple((asked * k / STEPS, count(k), tried[k][1]) for k in sorted(tried))
        return Shrink(asked, reason, curve, floor, tried[k][0], scored)

    loss = f"{budget:g} points of {measured} on the clean images"
    if good(STEPS):
        if not count(STEPS):
            return found(STEPS, "no group of useless filters can leave as a whole: nothing more is removed")
        return found(STEPS, f"all that was asked for and can leave costs at most {loss}")
    if not good(0):
        return found(0, f"the suspicious filters alone cost more than {loss}: nothing more is removed")
    best, bad = 0, STEPS
    while bad - best > 1:
        middle = (best + bad) // 2
        best, bad = (middle, bad) if good(middle) else (best, middle)
    if not count(best):
        return found(best, f"even the least useful filters cost more than {loss}: nothing more is removed")
    return found(best, f"the largest share whose pruned model loses at most {loss}")
