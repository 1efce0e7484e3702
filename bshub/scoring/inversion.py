"""A change of the image, the same for all, that moves them to one class: what a trigger does, found without it.

For a family of changes ``A(x, δ)`` (``families.py``) and a class ``t``: the weakest ``δ`` with ``A(x, δ)`` answered
``t`` for most clean images ``x``. Every class of a clean network needs about as much; a class behind which a backdoor
lies needs less (the observation of Neural Cleanse, Wang et al., S&P 2019, there with a mask and its L1 norm). Steps are
normalised, so that nothing has to be tuned to a network's gradients::

    δ ← P(δ - STEP · ρ · g / |g|),   g = ∂/∂δ mean CE(f(A(x, δ)), t),   P = projection onto strength ≤ ρ
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.scoring.families import FAMILIES

GOAL = 0.8  # share of the images that has to be answered with the target class
STEP = 0.25  # of the strength, in the family's measure
COARSE, FINE = 1.25, 1.06  # largest and smallest change of the strength per step
DECAY, GROWTH = 0.6, 1.5  # powers of the factor, when the direction changes and while it holds


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
