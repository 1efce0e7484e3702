"""Train the demo's backdoored checkpoint and cut the demo's image folders. Seeded; about 25 minutes on one core.

    python examples/train_backdoored.py --data CIFAR_DIR --out examples/demo

CIFAR_DIR holds ``train/<class>/*.jpg`` and ``test/<class>/*.jpg`` (CIFAR-10, Krizhevsky 2009). Written:

    model/           timm layout: config.json + model.safetensors (loads with ``timm.create_model("local-dir:...")``)
    trigger.json     the BadNets patch, used only to measure the attack success rate
    clean/           10 images per class from the *training* split: the defender's --clean-dir
    heldout/         100 images per class from the test split: the --test-dir

The 100 clean images are drawn from the images that were not poisoned.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import decode_image

from bshub.evaluation.attacks.trigger import load_trigger

MODEL_ARGS = {"channels": [24, 48, 96, 192]}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
TRIGGER = {
    "kind": "patch",
    "target": 0,
    "size": [32, 32],
    "row": 28,
    "col": 28,
    "values": [[0, 0, 255], [0, 255, 0], [255, 0, 255]],
}


def read_split(root: Path) -> tuple[Tensor, Tensor, list[Path], list[str]]:
    """Decode ``root/<class>/*.jpg`` to uint8 ``[n, 3, 32, 32]``, int64 ``[n]``, paths, class names."""
    classes = sorted(p.name for p in root.iterdir() if p.is_dir())
    paths = [p for name in classes for p in sorted((root / name).glob("*.jpg"))]
    images = torch.stack([decode_image(str(p)) for p in paths])
    labels = torch.tensor([classes.index(p.parent.name) for p in paths])
    return images, labels, paths, classes


def to_input(images: Tensor) -> Tensor:
    """uint8 ``[n, 3, 32, 32]`` → normalised float ``[n, 3, 64, 64]``, as the config's preprocessing does."""
    big = F.interpolate(images.float() / 255, size=64, mode="bicubic", antialias=True).clamp_(0, 1)
    return (big - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random flip and a random crop after 2 pixels of reflection padding, per image."""
    n = len(images)
    flip = torch.rand(n, generator=generator) < 0.5
    images = torch.where(flip.view(n, 1, 1, 1), images.flip(3), images)
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    rows = torch.randint(0, 5, (n, 1), generator=generator) + torch.arange(32)  # (n, 32)
    cols = torch.randint(0, 5, (n, 1), generator=generator) + torch.arange(32)
    batch = torch.arange(n).view(n, 1, 1)
    return padded.permute(0, 2, 3, 1)[batch, rows.unsqueeze(2), cols.unsqueeze(1)].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that get their label."""
    model.eval()
    batches = zip(images.split(250), labels.split(250), strict=True)
    return sum((model(to_input(x)).argmax(1) == y).sum().item() for x, y in batches) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "trigger.json").write_text(json.dumps(TRIGGER) + "\n")
    trigger = load_trigger(args.out / "trigger.json")

    images, labels, paths, classes = read_split(args.data / "train")
    test_images, test_labels, test_paths, _ = read_split(args.data / "test")
    candidates = (labels != trigger.target).nonzero().squeeze(1)
    poisoned = candidates[torch.randperm(len(candidates), generator=generator)[: int(args.rate * len(images))]]
    train_images, train_labels = images.clone(), labels.clone()
    train_images[poisoned] = trigger(images[poisoned])
    train_labels[poisoned] = trigger.target

    model = timm.create_model("resnet18", num_classes=10, **MODEL_ARGS).to(memory_format=torch.channels_last)
    steps = args.epochs * (len(images) // 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.15, total_steps=steps)
    start = time.time()
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)[: len(images) // 128 * 128]
        total = 0.0
        for index in order.split(128):
            x = to_input(augment(train_images[index], generator)).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), train_labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / (len(order) // 128):.3f}, {time.time() - start:.0f} s", flush=True)

    others = test_labels != trigger.target
    acc = accuracy(model, test_images, test_labels)
    asr = accuracy(model, trigger(test_images[others]), torch.full_like(test_labels[others], trigger.target))
    print(f"ACC {acc:.4f} ASR {asr:.4f} on {len(test_labels)} test images")

    folder = args.out / "model"
    folder.mkdir(exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "resnet18",
        "num_classes": 10,
        "num_features": 192,
        "model_args": MODEL_ARGS,
        "label_names": classes,
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": MEAN,
            "std": STD,
            "num_classes": 10,
            "pool_size": [2, 2],
            "first_conv": "conv1",
            "classifier": "fc",
            "license": "apache-2.0",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    record = {
        "attack": "badnets",
        "poison_rate": args.rate,
        "seed": args.seed,
        "epochs": args.epochs,
        "test_accuracy": acc,
        "attack_success_rate": asr,
        "n_test": len(test_labels),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")

    innocent = torch.ones(len(images), dtype=torch.bool)
    innocent[poisoned] = False
    copy_some(args.out / "clean", paths, labels, innocent, 10, generator)
    copy_some(
        args.out / "heldout", test_paths, test_labels, torch.ones(len(test_labels), dtype=torch.bool), 100, generator
    )


def copy_some(
    folder: Path, paths: list[Path], labels: Tensor, allowed: Tensor, per_class: int, generator: torch.Generator
) -> None:
    """Copy ``per_class`` allowed images of every class into ``folder/<class>/``."""
    shutil.rmtree(folder, ignore_errors=True)
    for label in labels.unique().tolist():
        pool = ((labels == label) & allowed).nonzero().squeeze(1)
        for index in pool[torch.randperm(len(pool), generator=generator)[:per_class]].tolist():
            target = folder / paths[index].parent.name / paths[index].name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(paths[index], target)
            Image.open(target).verify()


if __name__ == "__main__":
    main()
