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
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
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
        numbers = {"budget": self.budget, "finetune_lr": self.finetune_lr}
        numbers |= {} if self.mu == "auto" else {"mu": self.mu}  # type: ignore[dict-item]
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                kind = "a number or 'auto'" if name == "mu" else "a number"
                raise UsageError(f"{name} must be {kind}, not {value!r}")
        if not 0 <= self.budget <= 100:
            raise UsageError(f"budget is accuracy in points, 0 to 100, not {self.budget!r}")
        if not 0 < self.finetune_lr <= 10:
            raise UsageError(f"finetune_lr must lie above 0 and not above 10, not {self.finetune_lr!r}")
        for name, low, high in (("finetune_epochs", 0, 10_000), ("batch_size", 1, 2**20), ("seed", 0, 2**63 - 1)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise UsageError(f"{name} must be a whole number from {low} to {high}, not {value!r}")

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)
