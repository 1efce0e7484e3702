"""Sanitize, publish to a Hub on this machine, load in fresh processes by every route, compare the answers.

    python examples/round_trip.py [--models timm/resnet18 …] [--out docs/round-trip.md]

Each model has random weights with calibrated batch norms and its own answers on noise pictures for labels, so nothing
is downloaded. The routes: ``bshub.load``, the card's text with torch and the model library alone, plain timm on the
dense copy, and onnxruntime. All but the first run where bshub cannot be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples" / "coverage")]

MODELS = (
    "timm/resnet18",
    "timm/mobilenetv3_large_100",
    "timm/efficientnet_b0",
    "timm/densenet121",
    "timm/regnety_004",
    "timm/vgg11_bn",
)
ROUTES = ("bshub", "snippet", "dense", "onnxruntime")
PICTURES = 12
CLOSE = 1e-4  # of the largest logit, the bound of the ONNX comparison


def prepare(reference: str, folder: Path) -> tuple[int, int, int]:
    """Write ``weights.safetensors`` and ``clean/<index>/*.png``; gives the input size."""
    import torch
    from PIL import Image
    from probe import build
    from safetensors.torch import save_file

    model, size = build(reference)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    import bshub

    preprocessing = bshub.load(str(folder / "weights.safetensors"), arch=reference).preprocessing
    generator = torch.Generator().manual_seed(3)
    for number in range(PICTURES):
        coarse = torch.rand(1, 3, 7, 7, generator=generator) * 255
        picture = torch.nn.functional.interpolate(coarse, size=size[1:], mode="bilinear")[0].byte()
        with torch.no_grad():
            label = int(model(preprocessing(picture)[None]).argmax())
        place = folder / "clean" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(place / f"{number}.png")
    return size


def child(arguments: list[str], environment: dict[str, str]) -> str:
    """Run this Python on something else and give its stdout."""
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:4])} …: {done.stderr[-2000:]}")
    return done.stdout


def round_trip(reference: str, hub: Any, folder: Path) -> dict[str, Any]:
    """One model, there and back.

    Returns:
        Sizes, and per route the largest difference to the model on disk, relative to its largest logit.
    """
    import torch
    from loopback_hub import environment
    from safetensors.torch import load_file, save_file

    import bshub

    size = prepare(reference, folder)
    name = reference.rpartition("/")[2]
    env = {**os.environ, **environment(hub.url, folder / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = ["-c", "from bshub_cli.main import app; app()"]
    report = json.loads(
        child(
            [*run, "sanitize", str(folder / "weights.safetensors"), "--arch", reference, "--clean-dir",
             str(folder / "clean"), "--mu", "1.5", "--finetune-epochs", "1", "--dense", "-o", str(folder / "out"),
             "--push-to", f"me/{name}", "--json"],
            env,
        )
    )  # fmt: skip
    child([*run, "publish", str(folder / "out" / "dense"), "--repo", f"me/{name}-dense", "--json"], env)
    images = torch.randn(4, *size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = bshub.load(str(folder / "out")).module(images)
    save_file({"images": images}, folder / "images.safetensors")
    errors = {}
    for routes in (ROUTES[:1], ROUTES[1:]):
        child([__file__, "--load", f"me/{name}", "--routes", *routes, "--folder", str(folder)], env)
    for route in ROUTES:
        ours = load_file(folder / f"{route}.safetensors")["logits"]
        assert torch.equal(ours.argmax(1), wanted.argmax(1)), f"{reference}: {route} answers differently"
        errors[route] = float((ours - wanted).abs().max() / wanted.abs().max())
        assert errors[route] <= CLOSE, f"{reference}: {route} differs by {errors[route]:.2g}"
    return {
        "model": reference,
        "parameters": report["parameters"],
        "removed": report["counts"]["removed"] + report["counts"]["followers"],
        "errors": errors,
    }


def load(repository: str, routes: list[str], folder: Path) -> None:
    """The child's side: load by each route, write the logits."""
    if "bshub" not in routes:
        sys.modules["bshub"] = None  # type: ignore[assignment]
    import torch
    from safetensors.torch import load_file, save_file

    images = load_file(folder / "images.safetensors")["images"]
    for route in routes:
        with torch.no_grad():
            logits = torch.as_tensor(LOADERS[route](repository, images))
        save_file({"logits": logits.contiguous()}, folder / f"{route}.safetensors")


def by_bshub(repository: str, images: Any) -> Any:
    """``bshub.load`` of the small model."""
    import bshub

    return bshub.load(repository).module(images)


def by_snippet(repository: str, images: Any) -> Any:
    """The card's own text, run in a download of the repository."""
    return run_card(repository, '["bshub"]')(images)


def by_dense(repository: str, images: Any) -> Any:
    """Plain timm on the dense copy, a repository of its own; the card's text for torchvision, which has no loader."""
    import timm
    from huggingface_hub import hf_hub_download

    config = json.loads(Path(hf_hub_download(f"{repository}-dense", "config.json")).read_text(encoding="utf-8"))
    if config["architecture"].startswith("torchvision/"):
        return run_card(f"{repository}-dense", "load_state_dict").eval()(images)
    return timm.create_model(f"hf-hub:{repository}-dense", pretrained=True).eval()(images)


def run_card(repository: str, mark: str) -> Any:
    """Run the program of a card that holds ``mark``, in the repository's files; gives its ``model``."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository))
    text = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if mark in block)
    os.chdir(folder)
    space: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), space)
    return space["model"]


def by_onnxruntime(repository: str, images: Any) -> Any:
    """The ONNX file, found by the Hub's own client."""
    import onnxruntime
    from huggingface_hub import hf_hub_download

    session = onnxruntime.InferenceSession(
        hf_hub_download(repository, "model.onnx"), providers=["CPUExecutionProvider"]
    )
    return session.run(["logits"], {"images": images.numpy()})[0]


LOADERS = {"bshub": by_bshub, "snippet": by_snippet, "dense": by_dense, "onnxruntime": by_onnxruntime}


INTRODUCTION = """\
# Round trip

Random weights with calibrated batch norms, sanitized (μ 1.5, one pass of repair, 224x224 noise), published to a
Hub on the same machine as `name` and `name-dense`, loaded in fresh processes by every route, all but the first without
bshub. The last four columns are the largest difference to the model on disk, relative to its largest logit, on four
images; every answer was the same. Made by `make round-trip`.

"""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | parameters before | after | filters gone | " + " | ".join(ROUTES) + " |",
        "|" + "---|" * (4 + len(ROUTES)),
    ]
    for row in rows:
        numbers = [f"{row['parameters'][when]:,}" for when in ("before", "after")]
        cells = [row["model"], *numbers, f"{row['removed']:,}", *(f"{row['errors'][route]:.0e}" for route in ROUTES)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path, help="where the table goes; stdout by default")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--routes", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load, args.routes, args.folder)
        return 0
    from loopback_hub import LoopbackHub

    rows = []
    with LoopbackHub() as hub:
        for reference in args.models:
            with tempfile.TemporaryDirectory() as name:
                rows.append(round_trip(reference, hub, Path(name)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            hub.repos.clear()
            hub.objects.clear()
    text = INTRODUCTION + table(rows)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
