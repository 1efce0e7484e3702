"""A score of your own in ten lines: a function from a layer's statistics to ``[out_channels]``, a line in ``SCORES``.

    python examples/custom_score.py

Higher means more suspicious. What a layer's statistics hold: ``bshub.scoring.statistics.PairStatistics``.
"""

from __future__ import annotations

from pathlib import Path

import torch

import bshub
from bshub.scoring.statistics import PairStatistics
from bshub.scoring.suspiciousness import SCORES, Score

DEMO = Path(__file__).parent / "demo"


def loud(statistics: PairStatistics) -> torch.Tensor:
    """Filters that could amplify much and shift away from what training saw, ``√spectral · (1 + bn_shift)``."""
    return statistics.spectral.sqrt() * (1 + statistics.bn_shift)


SCORES["loud"] = Score(loud, needs_images=True)


def main() -> None:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    loaded = bshub.load(str(DEMO / "model"))
    images = ImageFolder(str(DEMO / "clean"), lambda image: loaded.preprocessing(pil_to_tensor(image)))
    found = bshub.scan(loaded.module, DataLoader(images, batch_size=32), bshub.Settings(score="loud"))
    print(f"{found.plan.counts()['flagged']} filters above {found.threshold.mu:g} deviations")
    for layer, index, deviations in found.most_suspicious(5):
        print(f"  {layer}[{index}]  {deviations:.2f}")


if __name__ == "__main__":
    main()
