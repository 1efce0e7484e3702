"""Clean accuracy, attack success rate, robust accuracy, each with n and a 95 % interval; what was lost; DER."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bshub.errors import InconclusiveError, TriggerError
from bshub.graph.trace import in_mode

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """``hits`` of ``n``, as a share."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """The share, 0 to 1; NaN where nothing was counted."""
        return self.hits / self.n if self.n else math.nan

    def interval(self) -> tuple[float, float]:
        """Wilson score interval, 95 %."""
        if not self.n:
            return 0.0, 1.0
        p, n, z2 = self.hits / self.n, self.n, Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        # the ends are exact where p is 0 or 1, but for rounding
        low = 0.0 if self.hits == 0 else centre - half
        high = 1.0 if self.hits == n else centre + half
        return low, high

    def __str__(self) -> str:
        """``83.4 [80.9, 85.6] n=1000``, in percent."""
        low, high = self.interval()
        return f"{100 * self.value:.1f} [{100 * low:.1f}, {100 * high:.1f}] n={self.n}"

    def as_dict(self) -> dict[str, Any]:
        """For reports, in percent."""
        low, high = (round(100 * end, 2) for end in self.interval())
        return {"percent": round(100 * self.value, 2) if self.n else None, "low": low, "high": high, "n": self.n}


@dataclass(frozen=True)
class Evaluation:
    """Rates of one model on one set of images.

    Attributes:
        accuracy: Clean accuracy (ACC).
        attack_success: Triggered images of other classes that get the target label (ASR), if a trigger was given.
        robust_accuracy: The same images that still get their own label (RA).
        right: Of each clean image in turn 1 where the answer was right, else 0; :func:`accuracy_lost` pairs them.
    """

    accuracy: Rate
    attack_success: Rate | None = None
    robust_accuracy: Rate | None = None
    right: bytes = b""

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        rates = {"accuracy": self.accuracy, "asr": self.attack_success, "ra": self.robust_accuracy}
        return {name: rate.as_dict() for name, rate in rates.items() if rate is not None}


@dataclass(frozen=True)
class AccuracyLost:
    """What a network lost against another one on the same images. Those that both answer alike say nothing of it.

    Attributes:
        lost: Images that the first answers rightly and the second wrongly.
        gained: The other way round.
        n: All images.
    """

    lost: int
    gained: int
    n: int

    @property
    def value(self) -> float:
        """The share, negative where accuracy rose; NaN where nothing was counted."""
        return (self.lost - self.gained) / self.n if self.n else math.nan

    def interval(self) -> tuple[float, float]:
        """95 %, of a difference of paired shares: Wald's after half an image was added to each of the four cells.

        Source: Agresti and Min, *Simple improved confidence intervals for comparing matched proportions*, Statistics
        in Medicine 24, 2005.
        """
        n, difference = self.n + 2, self.lost - self.gained
        half = Z95 * math.sqrt(self.lost + self.gained + 1 - difference**2 / n) / n
        return max(difference / n - half, -1.0), min(difference / n + half, 1.0)

    def as_dict(self) -> dict[str, Any]:
        """For reports, in points."""
        low, high = (round(100 * end, 2) for end in self.interval())
        points = round(100 * self.value, 2) if self.n else None
        return {"points": points, "low": low, "high": high, "lost": self.lost, "gained": self.gained, "n": self.n}


def accuracy_lost(before: Evaluation, after: Evaluation) -> AccuracyLost:
    """Image by image, what the second network lost; far narrower than the difference of two intervals.

    Args:
        before: Of the original.
        after: Of the sanitized network on the same images, in the same order.

    Returns:
        The counts; none where the two were not counted on as many images.
    """
    if len(before.right) != len(after.right):
        return AccuracyLost(0, 0, 0)
    pairs = list(zip(before.right, after.right, strict=True))
    return AccuracyLost(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs), len(pairs))


Batch = tuple[Tensor, Tensor, Tensor | None]  # clean images, labels, the same images with the trigger


def evaluate_models(
    models: Sequence[nn.Module],
    batches: Iterable[Batch],
    target: int | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Evaluation]:
    """Count the answers of several models in one pass over the images.

    Args:
        models: Networks; their modes are restored.
        batches: ``(images [n, c, h, w], labels [n], triggered [n, c, h, w] or None)``.
        target: The attacker's label, needed where images carry a trigger; images of that class are left out of
            the attack success rate.
        progress: Called with the number of images of each finished batch.

    Returns:
        One evaluation a model.

    Raises:
        TriggerError: Triggered images without a target.
        InconclusiveError: There are no images.
    """
    right = [bytearray() for _ in models]
    success, robust = [0] * len(models), [0] * len(models)
    n = attacked = 0
    stamped_any = False
    for images, labels, stamped in batches:
        n += len(labels)
        labels = labels.cpu()
        others = torch.ne(labels, -1 if target is None else target)
        if stamped is not None:
            if target is None:
                raise TriggerError(
                    "the attack success rate needs the trigger's target label",
                    hint="pass target=LABEL, as trigger.json states it",
                )
            stamped_any = True
            attacked += int(others.sum())
        for k, model in enumerate(models):
            right[k] += bytes((_answers(model, images) == labels).tolist())
            if stamped is not None and target is not None:
                answers = _answers(model, stamped)[others]
                success[k] += int(torch.eq(answers, target).sum())
                robust[k] += int((answers == labels[others]).sum())
        if progress:
            progress(len(images))
    if not n:
        raise InconclusiveError(
            "there is no test image: nothing was measured",
            hint="give --test-dir images of other classes than the trigger's target",
        )
    return [
        Evaluation(
            Rate(sum(right[k]), n),
            Rate(success[k], attacked) if stamped_any else None,
            Rate(robust[k], attacked) if stamped_any else None,
            bytes(right[k]),
        )
        for k in range(len(models))
    ]


def clean_accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Rate:
    """Accuracy of one model on ``(images, labels)`` batches.

    Args:
        model: In evaluation mode.
        batches: ``(images [n, c, h, w], labels [n])``, on the model's device.

    Returns:
        The share of right answers, with n.
    """
    return evaluate_models([model], ((images, labels, None) for images, labels in batches))[0].accuracy


def der(before: Evaluation, after: Evaluation) -> float | None:
    """Defense effectiveness rating ``[max(0, ΔASR) - max(0, ΔACC) + 1] / 2``, 0 to 1; None without a trigger.

    Args:
        before: Rates of the original.
        after: Rates of the sanitized network on the same images.

    Returns:
        0…1; 0.5 is no effect.
    """
    if before.attack_success is None or after.attack_success is None:
        return None
    fewer_attacks = max(0.0, before.attack_success.value - after.attack_success.value)
    lost_accuracy = max(0.0, before.accuracy.value - after.accuracy.value)
    return (fewer_attacks - lost_accuracy + 1) / 2


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad(), in_mode(model, False):
        return model(images.to(device)).argmax(1).cpu()
