"""A change of the image, the same for all, that moves them to one class: what a trigger does, found without it.

For a family of changes ``A(x, δ)`` and a class ``t``: the weakest ``δ`` with ``A(x, δ)`` answered ``t`` for most clean
images ``x``. Every class of a clean network needs about as much; a class behind which a backdoor lies needs less (the
observation of Neural Cleanse, Wang et al., S&P 2019, there with a mask and its L1 norm). Strength is the root mean
square of ``δ`` or, where ``δ`` is to be a patch, the mean over the places of the length of their colour change, which
makes it sparse. Steps are normalised, so that nothing has to be tuned to a network's gradients::

    δ ← P(δ - STEP · ρ · g / |g|),   g = ∂/∂δ mean CE(f(A(x, δ)), t),   P = projection onto strength ≤ ρ

``FAMILIES`` is the registry: a family is one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GOAL = 0.8  # share of the images that has to be answered with the target class
STEP = 0.25  # of the strength, root mean square
GRID = 8  # nodes of a warp along each side
PLACES = 0.01  # share of the places that one step of a patch changes
HIGHEST = 3.0  # change of one place in a patch, in deviations of the clean images: about black to white
COARSE, FINE = 1.25, 1.06  # largest and smallest change of the strength per step
DECAY, GROWTH = 0.6, 1.5  # powers of the factor, when the direction changes and while it holds
TINY = 1e-12

Shape = tuple[int, ...]


def additive(images: Tensor, change: Tensor) -> Tensor:
    """``x + δ``, in deviations of the clean images: patches, blends and stripes.

    Args:
        images: ``[n, c, h, w]``.
        change: ``[c, h, w]``.

    Returns:
        ``[n, c, h, w]``.
    """
    return images + change * images.std()


def warp(images: Tensor, change: Tensor) -> Tensor:
    """``x`` read at ``p + δ(p)``, with ``δ`` bicubic between 8 by 8 nodes; the image spans -1 to 1.

    Args:
        images: ``[n, c, h, w]``.
        change: ``[2, GRID, GRID]``: to the right and down.

    Returns:
        ``[n, c, h, w]``; the border continues what lies on it.
    """
    n, _, height, width = images.shape
    field = F.interpolate(change.unsqueeze(0), (height, width), mode="bicubic", align_corners=True)
    still = F.affine_grid(torch.eye(2, 3, device=images.device).unsqueeze(0), [1, 1, height, width], align_corners=True)
    places = (still + field.permute(0, 2, 3, 1)).expand(n, -1, -1, -1)
    return F.grid_sample(images, places, padding_mode="border", align_corners=True)


def dense_step(slope: Tensor, size: float) -> Tensor:
    """Everywhere.

    Args:
        slope: Of the loss, any shape.
        size: Root mean square of the step.

    Returns:
        The step, of the same shape.
    """
    return slope * (size / (_rms(slope) + TINY))


def dense_fit(change: Tensor, strength: float) -> Tensor:
    """Projection onto a root mean square of at most ``strength``.

    Args:
        change: Any shape.
        strength: The bound.

    Returns:
        The change, no larger.
    """
    return change / (_rms(change) / strength).clamp_min(1)


def sparse_step(slope: Tensor, size: float) -> Tensor:
    """At the places with the steepest slope only: the steepest descent of a sparse change.

    Args:
        slope: Of the loss, ``[c, h, w]``.
        size: Half of the mean length over all places.

    Returns:
        The step, ``[c, h, w]``, zero at all but ``PLACES`` of the places.
    """
    steep = slope.norm(dim=0)
    few = steep >= steep.flatten().topk(max(1, round(PLACES * steep.numel()))).values[-1]
    kept = slope * few
    return kept * (2 * size / (kept.norm(dim=0).mean() + TINY))


def sparse_fit(change: Tensor, strength: float) -> Tensor:
    """Soft threshold of the places' lengths to a mean of at most ``strength``, which none above ``HIGHEST`` survives.

    Args:
        change: ``[c, h, w]``.
        strength: The bound.

    Returns:
        ``[c, h, w]``.
    """
    norms = change.norm(dim=0)
    capped = norms.clamp_max(HIGHEST)
    if float(capped.mean()) > strength:
        low, high = torch.zeros(()), capped.max().cpu()
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if float((capped - middle).clamp_min(0).mean()) > strength else (low, middle)
        capped = (capped - high.to(capped.device)).clamp_min(0)
    return change * (capped / (norms + TINY))


@dataclass(frozen=True)
class Family:
    """A kind of change.

    Attributes:
        apply: ``(images, change) → images``.
        shape: Shape of the images → shape of the change.
        start: Strength that a search begins with.
        most: Strength beyond which a change is no trigger any more: it may show another class to anyone.
        step: ``(slope, size)`` → how far to go against the slope.
        fit: ``(change, strength)`` → the nearest change of at most that strength.
        local: Whether it is of a few places: a stroke, or a part by which a class is known, may be such a change.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    shape: Callable[[Shape], Shape]
    start: float
    most: float
    step: Callable[[Tensor, float], Tensor]
    fit: Callable[[Tensor, float], Tensor]
    local: bool = False


FAMILIES: dict[str, Family] = {
    "additive": Family(additive, lambda image: image[1:], 0.2, 0.28, dense_step, dense_fit),
    "patch": Family(additive, lambda image: image[1:], 0.1, 0.12, sparse_step, sparse_fit, local=True),
    "warp": Family(warp, lambda image: (2, GRID, GRID), 0.02, 0.03, dense_step, dense_fit),
}


class InvertedTrigger:
    """A change toward one class, at some strength; callable on images.

    Args:
        family: Key of ``FAMILIES``.
        target: The class.
        images: Any clean images, for shape and device.

    Attributes:
        strength: Bound of the change, in the measure of its family.
        reached: Share of the images of the last step that were answered with the target before it.
        confidence: Their mean probability of the target.
    """

    def __init__(self, family: str, target: int, images: Tensor) -> None:
        self.family, self.target = family, target
        self._of = FAMILIES[family]
        self.strength, self.reached, self.confidence = self._of.start, 0.0, 0.0
        self._factor, self._down, self._streak = COARSE, False, 0
        self.change = torch.zeros(self._of.shape(tuple(images.shape)), device=images.device)

    def __call__(self, images: Tensor) -> Tensor:
        """The images with the trigger, ``[n, c, h, w]``."""
        return self._of.apply(images, self.change)

    def copy(self) -> InvertedTrigger:
        """Another one that goes on by itself."""
        twin = InvertedTrigger.__new__(InvertedTrigger)
        twin.__dict__.update(self.__dict__, change=self.change.clone())
        return twin

    def sharpen(self, model: nn.Module, images: Tensor, half: bool = False) -> None:
        """One step toward the target, at the present strength.

        Args:
            model: In evaluation mode; its parameters get no gradient.
            images: ``[n, c, h, w]``, n > 0, best none of the target class.
            half: Whether to compute in bfloat16.
        """
        change = self.change.clone().requires_grad_()
        with torch.enable_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits = model(self._of.apply(images, change)).float()
        wanted = torch.full((len(images),), self.target, device=images.device)
        loss = F.cross_entropy(logits, wanted)
        (slope,) = torch.autograd.grad(loss, change)
        self.reached = float((logits.argmax(1) == self.target).float().mean())
        self.confidence = float(logits.detach().softmax(1)[:, self.target].mean())
        if bool(slope.isfinite().all()):
            self.change = self._of.fit(self.change - self._of.step(slope, STEP * self.strength), self.strength)

    def adapt(self) -> None:
        """Weaker where the last step saw ``GOAL`` reached, stronger otherwise.

        By a factor that falls with each change of direction and grows back while the direction holds: far from its
        need a trigger walks quickly, and around it the steps are fine.
        """
        down = self.reached >= GOAL
        self._streak = self._streak + 1 if down == self._down else 0
        power = DECAY if not self._streak else GROWTH if self._streak > 1 else 1.0
        self._factor = min(COARSE, max(FINE, self._factor**power))
        self._down = down
        self.set(min(self.strength / self._factor if down else self.strength * self._factor, self._of.most))

    def set(self, strength: float) -> None:
        """Go on at another strength, the change keeping its form."""
        self.change = self._of.fit(self.change, strength)
        self.strength = strength

    @property
    def most(self) -> float:
        """The family's largest strength."""
        return self._of.most

    @property
    def local(self) -> bool:
        """Whether it changes a few places alone."""
        return self._of.local

    @property
    def need(self) -> tuple[float, float]:
        """For comparison with other classes, the least first: the strength; between equals, what it reaches."""
        return self.strength, -self.confidence

    @torch.no_grad()
    def success(self, model: nn.Module, images: Tensor, labels: Tensor, size: int = 256) -> float:
        """Share of the images of other classes that are answered with the target, 0 to 1; 0 if there are none.

        Args:
            model: In evaluation mode.
            images: ``[n, c, h, w]``.
            labels: ``[n]``.
            size: Images per run.
        """
        others = images[labels != self.target]
        hits = sum(int((model(self(part)).argmax(1) == self.target).sum()) for part in others.split(size) if len(part))
        return hits / max(len(others), 1)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
