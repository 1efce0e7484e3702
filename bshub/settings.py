"""Everything a sanitize run can be told, in one frozen record."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from bshub.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Attributes:
        score: Key of ``SCORES``; which filters look suspicious.
        mu: Threshold ``mean + mu · std`` per layer, or ``auto``: the lowest one within ``budget``.
        budget: Accuracy on the clean images, in points, that pruning may cost before the repair (``auto``).
        repair: Key of ``REPAIRS``.
        finetune_epochs: Passes over the clean images after the surgery.
        finetune_lr: Peak learning rate of these passes.
        batch_size: Images per batch.
        seed: Seed of everything random.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
    """

    score: str = "lipschitz"
    mu: float | str = "auto"
    budget: float = 5.0
    repair: str = "distil"
    finetune_epochs: int = 10
    finetune_lr: float = 0.002
    batch_size: int = 32
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be; NaN is never a setting."""
        if self.mu != "auto" and not (isinstance(self.mu, (int, float)) and math.isfinite(self.mu)):
            raise UsageError(f"mu must be a number or 'auto', not {self.mu!r}")
        if not (math.isfinite(self.budget) and 0 <= self.budget <= 100):
            raise UsageError(f"budget is accuracy in points, 0 to 100, not {self.budget!r}")
        if not (isinstance(self.finetune_epochs, int) and 0 <= self.finetune_epochs <= 10_000):
            raise UsageError(f"finetune_epochs must be a whole number from 0 on, not {self.finetune_epochs!r}")
        if not (math.isfinite(self.finetune_lr) and 0 < self.finetune_lr <= 10):
            raise UsageError(f"finetune_lr must be positive, not {self.finetune_lr!r}")
        if not (isinstance(self.batch_size, int) and self.batch_size >= 1):
            raise UsageError(f"batch_size must be at least 1, not {self.batch_size!r}")

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)
