"""Draw ``docs/attacks/NAME.png``: four images of the demo, clean | triggered | difference x5.

    python examples/attack_pictures.py --models DIR --out docs/attacks

Two attacks need models that ``bshub attack`` has trained, looked for in DIR by the attack in their training.json:
the learned trigger of ``input-aware``, and a clean control (``none``) against which ``label-consistent`` perturbs the
images of its target class. Without them these two pictures are left as they are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import bshub
from bshub.evaluation.attacks.interface import Setup
from bshub.evaluation.attacks.label_consistent import corners_trigger, harden
from bshub.evaluation.attacks.registry import ATTACKS
from bshub.evaluation.attacks.trigger import load_trigger
from bshub.intake.images import read_image
from bshub.progress import Steps

DEMO = Path(__file__).parent / "demo" / "heldout"
CHOSEN = ("automobile", "frog", "horse", "ship")
TARGETS = 4  # images of the target class, for the clean-label perturbation
SCALE, GAP, LEFT = 4, 6, 104
FACTOR = 5


def draw(rows: dict[str, Tensor], path: Path) -> None:
    """A grid of images, uint8 ``[4, 3, 32, 32]`` a row, a label before each row."""
    side = 32 * SCALE
    width, height = LEFT + 4 * (side + GAP), len(rows) * (side + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for r, (label, images) in enumerate(rows.items()):
        top = GAP + r * (side + GAP)
        pen.multiline_text((LEFT - 10, top + side // 2), label, "black", font, anchor="rm", align="right")
        for c, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (LEFT + c * (side + GAP), top))
    if len(rows) > 3:
        sheet = sheet.quantize(256, dither=Image.Dither.NONE)  # for the size of the file
    sheet.save(path, optimize=True)


def difference(before: Tensor, after: Tensor) -> Tensor:
    """``128 + 5 · (after - before)``: grey where nothing changed."""
    return (128 + FACTOR * (after.int() - before.int())).clamp(0, 255).to(torch.uint8)


def setup_for(images: Tensor, folder: Path) -> Setup:
    """As in a training with seed 0 and target 0 on these images."""
    return Setup(
        labels=torch.arange(len(images)) % 2, read=lambda index: images[index], size=(32, 32), target=0, rate=0.25,
        seed=0, normalise=lambda pixels: pixels, device=torch.device("cpu"), folder=folder,
        surrogate=torch.nn.Identity, steps=Steps(),
    )  # fmt: skip


def trained(models: Path | None, attack: str) -> Path | None:
    """A folder that ``bshub attack`` wrote with this attack, the first by name."""
    for record in sorted(models.glob("*/training.json")) if models else ():
        if json.loads(record.read_text(encoding="utf-8"))["attack"] == attack:
            return record.parent
    return None


def perturbed_rows(clean_model: Path, folder: Path) -> dict[str, Tensor]:
    """Images of the target class before and after the ascent, then patched as in training."""
    model = bshub.load(str(clean_model))
    config = model.preprocessing.config
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = torch.stack([read_image(path) for path in sorted((DEMO / "airplane").iterdir())[:TARGETS]])
    setup = setup_for(images, folder)
    setup = Setup(**{**vars(setup), "normalise": lambda pixels: (pixels - mean) / std})
    hard = harden(model.module, images, torch.zeros(TARGETS, dtype=torch.long), setup, 16.0, 20, 1.6)
    poisoned = corners_trigger(0, (32, 32))(hard)
    return {"clean,\ntarget class": images, "poisoned in\ntraining": poisoned,
            f"difference\nx{FACTOR}": difference(images, poisoned)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/attacks"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    images = torch.stack([read_image(sorted((DEMO / name).iterdir())[0]) for name in CHOSEN])
    for name, attack in ATTACKS.items():
        with tempfile.TemporaryDirectory() as folder:
            if name == "none":
                continue
            if name == "input-aware":
                found = trained(args.models, name)
                trigger = load_trigger(found / "trigger.json") if found else None
            elif name == "label-consistent":
                found = trained(args.models, "none")
                trigger = corners_trigger(0, (32, 32)) if found else None
            else:
                trigger = attack(setup_for(images, Path(folder))).trigger()
            if trigger is None:
                print(f"{name}: no trained model, left as it is")
                continue
            stamped = trigger(images)
            rows = {"clean": images, "triggered": stamped, f"difference\nx{FACTOR}": difference(images, stamped)}
            if name == "label-consistent":
                rows = {**perturbed_rows(found, Path(folder)), "triggered\nat test": stamped}
            draw(rows, args.out / f"{name}.png")
            print(f"{name}: {(args.out / f'{name}.png').stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
