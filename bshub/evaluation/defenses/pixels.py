"""Perturbations in units of pixels, for a defense that is not told how its images were normalised."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PixelRange:
    """Where black and white lie in normalised images, per channel.

    Attributes:
        low: The darkest value, ``[1, c, 1, 1]``.
        span: Distance to the brightest, ``[1, c, 1, 1]``: one unit of a perturbation.
    """

    low: Tensor
    span: Tensor

    @classmethod
    def of(cls, images: Tensor) -> PixelRange:
        """Read off the extremes of some images ``[n, c, h, w]``.

        A few photographs hold black and white pixels, and then ``span`` is exactly 1/σ of the normalisation.
        """
        low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
        return cls(low, high - low)

    def add(self, images: Tensor, perturbation: Tensor) -> Tensor:
        """``images`` plus a perturbation in units of the pixel range."""
        return images + perturbation * self.span

    def clip(self, images: Tensor) -> Tensor:
        """Cut what is darker than black or brighter than white."""
        return images.clamp(self.low, self.low + self.span)
