"""Train the models of ``zoo.txt`` with ``bshub attack``: ``zoo.py --data CIFAR --out out/zoo``.

Models that are there are kept and an interrupted one is continued, so the command may be killed and repeated. With
``--images 10000`` a fixed tenth part of every class is hard-linked into a folder of its own and trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

from demo import BSHUB

HERE = Path(__file__).parent
CIFAR = "num_classes=10&stem=cifar"
ARCHITECTURES = {  # {w}: the width that is asked for; the others are small by themselves
    "resnet18": f"timm/resnet18?{CIFAR}&channels={{w}},{{2w}},{{4w}},{{8w}}&input_size=32",
    "resnet18-64px": "timm/resnet18?num_classes=10&channels={w},{2w},{4w},{8w}&input_size=64",  # timm's own stem
    "resnet34": f"timm/resnet34?{CIFAR}&channels={{w}},{{2w}},{{4w}},{{8w}}&input_size=32",
    "vgg11": "timm/vgg11_bn?num_classes=10&mlp_ratio=0.125&input_size=32",
    "densenet": f"timm/densenet121?{CIFAR}&growth_rate=8&block_config=6,12,12&input_size=32",
    "mobilenetv3": f"timm/mobilenetv3_large_075?{CIFAR}&input_size=32",
}
# what a model's name begins with → its own data, and how many times the epochs: the digits are 35 times fewer images
DATA = {"digits": (Path("sklearn/digits"), 5)}
# architecture → share of the epochs and peak learning rate. VGG comes in its full width alone, where an epoch costs
# four of the others' at quarter width, and without shortcuts it diverges at the rate of the others
OWN = {"vgg11": (1 / 3, 0.05)}
# attack → peak learning rate: a pattern network that learns beside the classifier cannot follow at the rate of the
# others, where input-aware came to an ASR of 21 %; its authors take 0.01, over a hundred times the epochs
ATTACK_LR = {"input-aware": 0.02}


def models(wanted: str | None = None) -> list[dict[str, str]]:
    """The lines of ``zoo.txt``, of one set or all."""
    keys = ("set", "name", "arch", "attack", "rate", "seed", "target")
    lines = [line.split() for line in (HERE / "zoo.txt").read_text().splitlines() if line and not line.startswith("#")]
    return [row for row in (dict(zip(keys, line, strict=True)) for line in lines) if wanted in (None, row["set"])]


def subset(data: Path, out: Path, images: int) -> Path:
    """Hard links to the first images of every class of ``train/`` and to all of ``test/``."""
    if out.is_dir():
        return out
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    classes = sorted(path for path in (data / "train").iterdir() if path.is_dir())
    for folder in classes:
        for file in sorted(folder.iterdir())[: images // len(classes)]:
            _link(file, partial / "train" / folder.name / file.name)
    for file in sorted((data / "test").glob("*/*")):
        _link(file, partial / "test" / file.parent.name / file.name)
    partial.rename(out)
    return out


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)


def architecture(name: str, width: int) -> str:
    """The reference of a network whose narrowest stage has ``width`` channels."""
    text = ARCHITECTURES[name]
    for factor in (1, 2, 4, 8):
        text = text.replace("{w}" if factor == 1 else f"{{{factor}w}}", str(factor * width))
    return text


def train(row: dict[str, str], data: Path, out: Path, width: int, epochs: int) -> None:
    """One model, in a process of its own; label-consistent turns images against the clean control, if that is there."""
    command = [BSHUB, "attack", architecture(row["arch"], width)]
    data, longer = DATA.get(row["name"].partition("-")[0], (data, 1))
    share, lr = OWN.get(row["arch"], (1, None))
    epochs = max(1, round(epochs * longer * share))
    attack, *options = row["attack"].split(":")
    lr = ATTACK_LR.get(attack, lr)
    command += ["--lr", str(lr)] if lr else []
    command += ["--data", str(data), "--output", str(out / row["name"]), "--attack", attack]
    command += [word for option in options for word in ("--option", option)]
    command += ["--rate", row["rate"], "--seed", row["seed"], "--target", row["target"], "--epochs", str(epochs)]
    alike = [other for other in models(row["set"]) if other["arch"] == row["arch"]]
    controls = [out / other["name"] for other in alike if other["attack"] == "none"]
    if row["attack"] == "label-consistent":
        trained = [control for control in controls if (control / "training.json").exists()]
        command += ["--surrogate", str(trained[0])] if trained else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    record = json.loads((out / row["name"] / "training.json").read_text())
    rates = record["evaluation"]
    print(row["name"], *(f"{name} {rate['percent']}" for name, rate in rates.items() if "percent" in rate), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds train/<class>/ and test/<class>/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", help="only the models of that set")
    parser.add_argument("--names", nargs="+", help="only these, in this order")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=64, help="channels of ResNet-18's first stage; 64 is the full one")
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = subset(args.data, args.out / f"data-{args.images}", args.images)
    rows = models(args.set)
    for row in [row for name in args.names for row in rows if row["name"] == name] if args.names else rows:
        train(row, data, args.out, args.width, args.epochs)


if __name__ == "__main__":
    main()
