"""What every defense takes and gives; ``registry.py`` lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bshub.clean import CleanImages


@dataclass(frozen=True)
class DefenseSettings:
    """What a run may tell any defense; hyper-parameters of one method are keyword arguments of its function.

    Attributes:
        seed: Of everything random.
        batch_size: Images per step; a smaller clean set is one batch.
        effort: Share of the published number of iterations or epochs, 1 = as published. Tables name it.
        progress: Called with the number of finished steps.
    """

    seed: int = 0
    batch_size: int = 128
    effort: float = 1.0
    progress: Callable[[int], None] = lambda steps: None

    def rounds(self, published: int) -> int:
        """``published`` iterations at this effort, at least one."""
        return max(1, round(self.effort * published))


Defense = Callable[[nn.Module, CleanImages, DefenseSettings], nn.Module]
"""``(model, clean images, settings) → defended copy in evaluation mode``; the given model is not changed."""
