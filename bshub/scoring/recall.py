"""Which share of the training images carried a change? Batch norm remembers it, and a few clean images can ask.

Running statistics are means over the training images. Where a share ``p`` of these carried a change, they lie off the
clean images by ``p`` times what the change does, and by what drawing few images explains::

    Δ = running - clean = p d + noise,   d = E[m(x + change)] - E[m(x)],   noise ~ N(0, Σ / n)

with ``m`` the first two moments of each filter's map, image by image, and ``Σ`` their covariance over the ``n`` clean
images, shrunk to be invertible. Generalised least squares gives ``p = dᵀΣ⁻¹Δ / dᵀΣ⁻¹d`` of each layer: directions in
which images differ anyway count little, and that is what makes ten images enough. What fools one layer by chance does
not fool all: three of four have to agree. A change that hardly comes to a share is asked again beside the others that
do, with a column of ``d`` for each: what they explain is no evidence for it.

The question is put to waves. A sinusoid over the image leads innocent networks to some class too, at twice to five
times the amplitude for the next one, so that no gap decides (``shortcut.py``); whether it was trained on does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bshub.copying import named_tensors
from bshub.graph.pairs import ConvBN, Pairing
from bshub.graph.trace import in_mode
from bshub.scoring.families import FAMILIES
from bshub.scoring.feed import Feed
from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.response import Hook, strongest, trigger_response, watching
from bshub.scoring.shortcut import EXCESS, Shortcut, race, settle
from bshub.scoring.statistics import asking_only
from bshub.scoring.stream import affine_of

MOST = 128  # images that are asked
SHRUNK = 0.1  # of the mean variance, that is added to each
SHARE, BY_CHANCE = 0.03, 0.7  # least share, and over the number of images: innocent ones came to 0.06 with ten
AGREE = 0.4  # of that, which three layers of four have to reach
ERRORS = 3.0  # standard errors that it has to reach
HARDLY = 1.5  # times the least share, up to which another change may explain it
REFUTED = 2.0  # standard errors that it has to stay below the least share then
WITHIN = 0.92  # of the family's largest strength: one that needs all of it has not arrived
TINY = 1e-5
TINY_SHARE = 1e-9  # of a change's length, that is added to it: two changes may be the same


@dataclass(frozen=True)
class Share:
    """Estimates of the share of training images that carried a change, over the layers.

    Attributes:
        median: Of them.
        low: Their lower quartile.
        error: Median of their standard errors, ``1 / √(n dᵀΣ⁻¹d)``: large where the change does little.
    """

    median: float
    low: float
    error: float

    def carried(self, images: int) -> bool:
        """Whether it is more than as many clean images explain by chance."""
        bound = least_share(images)
        return max(bound, ERRORS * self.error) <= self.median <= 1 and self.low >= AGREE * bound


def least_share(images: int) -> float:
    """The share from which a change was carried; so many clean images explain less by chance."""
    return SHARE + BY_CHANCE / images


class Memory:
    """What batch norm remembers beside some clean images.

    Args:
        model: In evaluation mode; not changed.
        pairing: Its pairs.
        images: Clean, ``[n, c, h, w]``; the first ``MOST`` are used.

    Attributes:
        count: How many were used.
    """

    def __init__(self, model: nn.Module, pairing: Pairing, images: Tensor) -> None:
        self._model, self._pairing, self.count = model, pairing, min(len(images), MOST)
        self._whitened: dict[str, _Whitening] = {}
        self._pulls: dict[str, Tensor] = {}
        for name, moments in self._moments(images[:MOST]).items():
            self._whitened[name] = _Whitening(moments)
            self._pulls[name] = self._whitened[name](-moments.mean(0))  # moments are counted from the running ones

    def moved(self, trigger: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, Tensor]:
        """What a change does to the moments.

        Args:
            trigger: Puts it on images.
            images: Clean ones, ``[n, c, h, w]``.

        Returns:
            Layer → ``d``, ``[2 filters]``.
        """
        images = images[:MOST]
        plain, changed = self._moments(images), self._moments(trigger(images))
        return {name: changed[name].mean(0) - plain[name].mean(0) for name in self._pulls}

    def shares(self, changes: Sequence[Mapping[str, Tensor]]) -> list[Share]:
        """Of the training images, how many carried a change, if it was as strong then; of a stronger one fewer.

        Of several each is asked beside the others: ``p = (DᵀΣ⁻¹D)⁻¹ DᵀΣ⁻¹Δ`` with a column of ``D`` for each.

        Args:
            changes: What each of them moves, see :meth:`moved`.

        Returns:
            The estimates, in the same order.
        """
        found, errors = [], []
        for name, pull in self._pulls.items():
            moved = torch.stack([change[name] for change in changes])
            lengths = torch.stack([self._whitened[name](row) for row in moved]) @ moved.T
            if float(lengths.diagonal().min()) > 0:
                inverse = torch.linalg.inv(lengths + torch.diag(TINY_SHARE * lengths.diagonal()))
                found.append(inverse @ (moved @ pull))
                errors.append((inverse.diagonal() / self.count).sqrt())
        if not found:
            return [Share(0.0, 0.0, 0.0) for _ in changes]
        shares, error = torch.stack(found), torch.stack(errors).quantile(0.5, 0).tolist()
        low, median = shares.quantile(torch.tensor([0.25, 0.5], dtype=shares.dtype), 0).tolist()
        return [Share(*estimate) for estimate in zip(median, low, error, strict=True)]

    def _moments(self, images: Tensor) -> dict[str, Tensor]:
        """First two moments of each paired filter's map, from the running ones in their units: ``[n, 2 filters]``."""
        with torch.no_grad(), _moments_of(self._model, self._pairing) as found:
            for part in images.split(32):
                self._model(part)
        return {name: torch.cat(parts) for name, parts in found.items()}


class _Whitening:
    """``v → Σ⁻¹ v`` with the shrunk covariance of ``rows``, by the kernel trick: there are fewer rows than columns."""

    def __init__(self, rows: Tensor) -> None:
        self._centred = rows - rows.mean(0)
        freedom = max(len(rows) - 1, 1)
        kernel = self._centred @ self._centred.T / freedom
        self._ridge = SHRUNK * float(kernel.trace()) / rows.shape[1] + TINY
        self._inverse = torch.linalg.inv(kernel + self._ridge * torch.eye(len(rows), dtype=rows.dtype)) / freedom

    def __call__(self, vector: Tensor) -> Tensor:
        return (vector - self._centred.T @ (self._inverse @ (self._centred @ vector))) / self._ridge


@contextmanager
def _moments_of(model: nn.Module, pairing: Pairing) -> Iterator[dict[str, list[Tensor]]]:
    named = named_tensors(model)
    found: dict[str, list[Tensor]] = {}

    def keeper(pair: ConvBN) -> Hook:
        affine, paired = affine_of(pair, named), torch.from_numpy(pair.paired)
        mean, variance = affine.mean.unsqueeze(1), affine.variance + TINY

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            off = output.detach().float().flatten(2) - mean
            first = off.mean(2) / variance.sqrt()
            second = (off.square().mean(2) - affine.variance) / variance
            both = torch.cat((first[:, paired], second[:, paired]), 1)
            found.setdefault(pair.name, []).append(both.double().cpu())

        return keep

    with watching(model, pairing, keeper):
        yield found


def recall(
    model: nn.Module,
    pairing: Pairing,
    images: Tensor,
    labels: Tensor,
    shortcut: Shortcut,
    seed: int,
    progress: Callable[[int], None] | None = None,
    half: bool = False,
) -> tuple[Shortcut, dict[str, Tensor]]:
    """Look for a change that was trained on, in the families in which innocent networks have a class that stands out.

    Args:
        model: In evaluation mode; not changed.
        pairing: Its pairs.
        images: Clean, normalised, ``[n, c, h, w]``.
        labels: ``[n]``.
        shortcut: What the search for gaps came to.
        seed: Of the order and the augmentation.
        progress: Called with the number of steps done.
        half: Whether to search in bfloat16.

    Returns:
        The same with what was found, and how each filter answers to it: convolution → ``[out_channels]``, empty where
        nothing was.
    """
    with torch.no_grad():
        classes = model(images[:1]).shape[-1]
    feed = Feed(model, images, labels, seed, progress or (lambda steps: None), half)
    memory = Memory(model, pairing, images)
    needs, kept, shares = dict(shortcut.needs), [], dict(shortcut.shares)
    with in_mode(model, False), asking_only(model, []):
        for family in (name for name, of in FAMILIES.items() if of.recalled):
            finalists = race(feed, family, classes)
            needs[family] = {trigger.target: need for trigger, need in finalists}
            arrived = [(trigger, need) for trigger, need in finalists if need <= WITHIN * trigger.most]
            for trigger, need, share in _carried(memory, arrived, images, labels):
                shares[trigger.target] = share.median
                settle(feed, trigger, min(EXCESS * need, trigger.most))
                kept.append(trigger)
    shown = images[:MOST], labels[:MOST]
    response = strongest([trigger_response(model, pairing, *shown, trigger) for trigger in kept])
    return replace(shortcut, triggers=(*shortcut.triggers, *kept), needs=needs, shares=shares), response


def _carried(
    memory: Memory, arrived: Sequence[tuple[InvertedTrigger, float]], images: Tensor, labels: Tensor
) -> list[tuple[InvertedTrigger, float, Share]]:
    """Those that training images carried, with their shares; not those that hardly did, and beside the others did not.

    A wave toward another class may hold some of the one that was trained on. But one that stands clearly by itself is
    kept whatever the others say: of ten images two changes that move much the same are hard to tell apart.
    """
    left = []
    for trigger, need in arrived:
        moved = memory.moved(trigger, images[labels != trigger.target])
        (share,) = memory.shares([moved])
        if share.carried(memory.count):
            left.append((trigger, need, share, moved))
    least = least_share(memory.count)
    while True:
        beside = memory.shares([moved for *_, moved in left]) if left else []
        explained = [
            index
            for index, (now, (_, _, alone, _)) in enumerate(zip(beside, left, strict=True))
            if alone.median < HARDLY * least and now.median + REFUTED * now.error < least
        ]
        if not explained:
            return [(trigger, need, share) for trigger, need, share, _ in left]
        del left[min(explained, key=lambda index: beside[index].median)]
