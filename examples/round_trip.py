"""Sanitize, publish to a Hub on this machine, load in fresh processes by every route, compare the answers.

    python examples/round_trip.py [--models timm/resnet18 …] [--out docs/round-trip.md]

Each model has random weights with calibrated batch norms and its own answers on noise pictures for labels, so nothing
is downloaded. One coupling group in seven, drawn at random, is made loud by its batch norms, so that there is something
to find in every layer; the run itself is an ordinary one. The routes: ``bshub.load``; the card's text and plain timm on
the dense copy, in an environment that holds torch, timm and what they need; the ONNX file in one that holds
onnxruntime, numpy and Pillow. In neither of the two can bshub be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
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
# Which routes are taken in which environment.
PLACES = {"all": ("bshub",), "torch": ("snippet", "dense"), "onnxruntime": ("onnxruntime",)}
ROUTES = tuple(route for routes in PLACES.values() for route in routes)
PICTURES = 12
LOUD = 64.0  # times its own scale: a batch norm of a filter that shall be found
LEAST = 0.1  # share of the filters that must have left, else a row says little
CLOSE = 1e-4  # of the largest logit, the bound of the ONNX comparison


def prepare(reference: str, folder: Path) -> tuple[int, int, int]:
    """Write ``weights.safetensors`` and ``clean/<index>/*.png``; gives the input size."""
    import torch
    from PIL import Image
    from probe import build
    from safetensors.torch import save_file

    model, size = build(reference)
    raise_voices(model, size)
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


def raise_voices(model: Any, size: tuple[int, int, int]) -> None:
    """Multiply the batch-norm scales of whole coupling groups, chosen at random, and calibrate again."""
    import torch
    from probe import calibrate, choose

    from bshub.graph.coupling import follow_channels
    from bshub.graph.pairs import find_pairs

    flow, _ = follow_channels(model, size)
    pairing = find_pairs(model, flow)
    chosen = choose(flow, pairing)
    with torch.no_grad():
        for pair in pairing.pairs:
            for reader in pair.readers:
                loud = torch.isin(torch.from_numpy(reader.filters), torch.as_tensor(chosen.get(pair.name, [])))
                model.get_parameter(reader.norm.weight)[torch.from_numpy(reader.channels)[loud]] *= LOUD
    calibrate(model, size)


def child(python: Path | str, arguments: list[str], environment: dict[str, str]) -> str:
    """Run a Python on something else and give its stdout."""
    done = subprocess.run([python, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:4])} …: {done.stderr[-2000:]}")
    return done.stdout


def round_trip(reference: str, hub: Any, folder: Path, pythons: dict[str, Path | str]) -> dict[str, Any]:
    """One model, there and back.

    Args:
        reference: Of the model.
        hub: It is published to.
        folder: For everything that lies on disk.
        pythons: Interpreter of each environment.

    Returns:
        Sizes, and per route the largest difference to the model on disk, relative to its largest logit.
    """
    import numpy
    import torch
    from bare_environment import bare_variables
    from loopback_hub import environment

    import bshub

    size = prepare(reference, folder)
    name = reference.rpartition("/")[2]
    hubs = {**environment(hub.url, folder / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env, bare = {**os.environ, **hubs}, bare_variables(hubs)
    run = ["-c", "from bshub_cli.main import app; app()"]
    report = json.loads(
        child(
            sys.executable,
            [*run, "sanitize", str(folder / "weights.safetensors"), "--arch", reference, "--clean-dir",
             str(folder / "clean"), "--mu", "0.6", "--finetune-epochs", "1", "--dense", "-o", str(folder / "out"),
             "--push-to", f"me/{name}", "--json"],
            env,
        )
    )  # fmt: skip
    child(sys.executable, [*run, "publish", str(folder / "out" / "dense"), "--repo", f"me/{name}-dense", "--json"], env)
    images = torch.randn(4, *size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = bshub.load(str(folder / "out")).module(images).numpy()
    numpy.save(folder / "images.npy", images.numpy())
    errors = {}
    for place, routes in PLACES.items():
        options = [__file__, "--load", f"me/{name}", "--routes", *routes, "--folder", str(folder)]
        child(pythons[place], options, env if place == "all" else bare)
    for route in ROUTES:
        ours = numpy.load(folder / f"{route}.npy")
        assert (ours.argmax(1) == wanted.argmax(1)).all(), f"{reference}: {route} answers differently"
        errors[route] = float(numpy.abs(ours - wanted).max() / numpy.abs(wanted).max())
        assert errors[route] <= CLOSE, f"{reference}: {route} differs by {errors[route]:.2g}"
    filters, counts = report["diagnosis"]["filters"], report["counts"]
    gone = counts["removed"] + counts["followers"]
    assert gone >= LEAST * filters, f"{reference}: only {gone} of {filters} filters left"
    return {
        "model": reference,
        "parameters": report["parameters"],
        "filters": filters,
        "removed": gone,
        "errors": errors,
    }


def load(repository: str, routes: list[str], folder: Path) -> None:
    """The child's side: load by each route, write the logits."""
    import numpy

    if "bshub" not in routes:
        try:
            import bshub  # noqa: F401
        except ImportError:
            pass
        else:
            raise RuntimeError("bshub can be imported here")
    images = numpy.load(folder / "images.npy")
    for route in routes:
        numpy.save(folder / f"{route}.npy", LOADERS[route](repository, images))


def answers(model: Any, images: Any) -> Any:
    """Logits of a torch network, as numpy has them."""
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(images)).numpy()


def by_bshub(repository: str, images: Any) -> Any:
    """``bshub.load`` of the small model."""
    import bshub

    return answers(bshub.load(repository).module, images)


def by_snippet(repository: str, images: Any) -> Any:
    """The card's own text, run in a download of the repository."""
    return answers(run_card(repository, '["bshub"]'), images)


def by_dense(repository: str, images: Any) -> Any:
    """Plain timm on the dense copy, a repository of its own; the card's text for torchvision, which has no loader."""
    import timm
    from huggingface_hub import hf_hub_download

    config = json.loads(Path(hf_hub_download(f"{repository}-dense", "config.json")).read_text(encoding="utf-8"))
    if config["architecture"].startswith("torchvision/"):
        return answers(run_card(f"{repository}-dense", "load_state_dict"), images)
    return answers(timm.create_model(f"hf-hub:{repository}-dense", pretrained=True), images)


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
    """The ONNX file, fetched as any program would: the Hub's client is not there."""
    import onnxruntime

    with urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/{repository}/resolve/main/model.onnx") as answer:
        session = onnxruntime.InferenceSession(answer.read(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


LOADERS = {"bshub": by_bshub, "snippet": by_snippet, "dense": by_dense, "onnxruntime": by_onnxruntime}


INTRODUCTION = """\
# Round trip

Six networks with random weights and calibrated batch norms; in each, one coupling group in seven, drawn at random, was
made loud (its batch-norm scales times 64). Sanitized by `bshub sanitize --mu 0.6 --finetune-epochs 1 --dense` on
twelve noise pictures, published to a Hub on the same machine as `name` and `name-dense`, and loaded from there in fresh
processes by every route:

* bshub: `bshub.load("me/name")`
* snippet: the text of the model card, in an environment with torch, timm and what they need
* dense: `timm.create_model("hf-hub:me/name-dense", pretrained=True)`, in the same environment
* onnxruntime: `model.onnx`, in an environment with onnxruntime, numpy and Pillow

In the last two environments bshub cannot be imported. The last four columns are the largest difference to the model on
disk, relative to its largest logit, on four images; every answer was the same. Filters gone are those that left the
network, of those with a batch norm. Made by `make round-trip`.

"""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | parameters before | after | filters | gone | " + " | ".join(ROUTES) + " |",
        "|" + "---|" * (5 + len(ROUTES)),
    ]
    for row in rows:
        numbers = [f"{row['parameters'][when]:,}" for when in ("before", "after")]
        gone = f"{row['removed']:,} ({100 * row['removed'] / row['filters']:.0f} %)"
        errors = [f"{row['errors'][route]:.0e}" for route in ROUTES]
        cells = [row["model"], *numbers, f"{row['filters']:,}", gone, *errors]
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
    from bare_environment import ONNXRUNTIME, TORCH_AND_TIMM, bare_python
    from loopback_hub import LoopbackHub

    rows = []
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as places:
        pythons: dict[str, Path | str] = {
            "all": sys.executable,
            "torch": bare_python(Path(places, "torch"), TORCH_AND_TIMM),
            "onnxruntime": bare_python(Path(places, "onnxruntime"), ONNXRUNTIME),
        }
        for reference in args.models:
            with tempfile.TemporaryDirectory() as name:
                rows.append(round_trip(reference, hub, Path(name), pythons))
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
