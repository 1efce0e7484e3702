"""Where the perturbation leads that I-BAU unlearns, on the demo's model: ``i_bau_reach.py``.

I-BAU ascends away from the network's own answers and trusts that the backdoor is the nearest way. Writes
``docs/results/i-bau.json``, which the results quote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from demo import DEMO, demo
from torch import Tensor, nn

from bshub.evaluation.attacks.trigger import load_trigger
from bshub.evaluation.defenses.i_bau import worst_perturbation

OUT = Path(__file__).parents[2] / "docs/results/i-bau.json"
STEPS, RATE = 20, 10.0  # 2,500 images in batches of 128, the authors' learning rate of the ascent


def reach(model: nn.Module, images: Tensor, labels: Tensor, target: int, steps: int = STEPS) -> dict[str, Any]:
    """Share of the images of other classes that are answered with the target, and rightly, before and after.

    Args:
        model: In evaluation mode.
        images: ``[n, c, h, w]``.
        labels: ``[n]``.
        target: The attacker's label.
        steps: Of the ascent, each on all images.

    Returns:
        Percent of ``target`` and ``right`` answers, ``n``, ``steps`` and the root mean square of the perturbation.
    """
    others = labels != target
    images, labels = images[others], labels[others]
    change = worst_perturbation(model, [(images, labels)] * steps, RATE)
    with torch.no_grad():
        answers = {"before": model(images).argmax(1), "after": model(images + change).argmax(1)}
    return {
        "n": len(labels),
        "steps": steps,
        "rms": round(float(change.square().mean().sqrt()), 3),
        "target": {when: _percent(answer == target) for when, answer in answers.items()},
        "right": {when: _percent(answer == labels) for when, answer in answers.items()},
    }


def _percent(hits: Tensor) -> float:
    return round(100 * float(hits.float().mean()), 1)


def main() -> None:
    torch.set_num_threads(1)
    source, batches = demo()
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    target = load_trigger(DEMO / "trigger.json").target
    OUT.write_text(json.dumps(reach(source.module.eval(), images, labels, target), indent=1) + "\n", encoding="utf-8")
    print(OUT.read_text())


if __name__ == "__main__":
    main()
