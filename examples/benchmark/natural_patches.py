"""How many clean images show a patch of BadNets by nature: ``natural_patches.py --data out/zoo/data-50000``.

What clean images show, training on them contradicts. Writes ``docs/results/patches.json``, which the results quote.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

import torch

from bshub.evaluation.attacks.badnets import PATTERNS, patch_trigger
from bshub.intake.folders import open_folder
from bshub.intake.images import read_image

OUT = Path(__file__).parents[2] / "docs/results/patches.json"
CLASSES = 10
NEAR = 5.0  # grey levels, mean over the patch


def shares(data: Path, near: float = NEAR) -> dict[str, object]:
    """Share of the training images whose pixels lie within ``near`` of a patch where it would be stamped."""
    paths = open_folder(data / "train", CLASSES, None).paths
    hits = dict.fromkeys(PATTERNS, 0)
    trigger_of = cache(patch_trigger)
    for path in paths:
        image = read_image(path)  # (3, H, W) uint8
        for name in PATTERNS:
            patch = trigger_of(0, (image.shape[1], image.shape[2]), name).params
            values, row, col = patch["values"], patch["row"], patch["col"]
            shown = image[:, row : row + values.shape[1], col : col + values.shape[2]]
            hits[name] += float((shown.float() - values.float()).abs().mean()) <= near
    return {"images": len(paths), "grey_levels": near, "percent": {k: 100 * v / len(paths) for k, v in hits.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds train/")
    torch.set_num_threads(1)
    OUT.write_text(json.dumps(shares(parser.parse_args().data), indent=1) + "\n", encoding="utf-8")
    print(OUT.read_text())


if __name__ == "__main__":
    main()
