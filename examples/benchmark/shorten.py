"""The demo's network with shorter filters and the same answers: ``shorten.py --zoo out/zoo``.

Batch norm divides the output of a filter by its spread, so that the filter's length does not matter to the answers.
To fine-tuning it does: with ``W/√k`` the gradient is ``√k`` times as large and the filter ``√k`` times as short, and
a step of the same learning rate turns it ``k`` times as far. What fine-tuning does at a fixed rate is thus a property
of how long the filters happened to become in training.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path

import torch
from demo import as_victim
from torch import Tensor, nn

from bshub.copying import named_tensors
from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import find_pairs
from bshub.intake.models import load_model
from bshub.release.artifact import WEIGHTS, write_weights

SHORTER = 5.0  # factor of the squared length
SHORT = "demo-short"


def shortened(model: nn.Module, input_size: tuple[int, int, int], factor: float = SHORTER) -> nn.Module:
    """A copy whose filters before a batch norm have ``1/factor`` of their squared length.

    The batch norm's running mean and variance follow: ``μ/√k`` and ``(σ²+ε)/k - ε``, which is exact as long as it stays
    positive.

    Args:
        model: In evaluation mode; not changed.
        input_size: ``(channels, height, width)``.
        factor: k.
    """
    short = copy.deepcopy(model)
    flow, _ = follow_channels(short, input_size)
    named = named_tensors(short)
    with torch.no_grad():
        for pair in find_pairs(short, flow).pairs:
            for reader in pair.readers:
                norm, at = reader.norm, torch.from_numpy(reader.channels)
                mean, variance = named[str(norm.mean)], named[str(norm.variance)]
                mean[at] /= factor**0.5
                variance[at] = ((variance[at] + norm.eps) / factor - norm.eps).clamp_min(0)
            weight, paired = named[f"{pair.name}.weight"], torch.from_numpy(pair.paired)
            weight[paired] /= factor**0.5
            if f"{pair.name}.bias" in named:
                named[f"{pair.name}.bias"][paired] /= factor**0.5
    return short


def squared_length(model: nn.Module) -> float:
    """``‖W[o]‖²`` of a convolution's filters, the median over all filters of the network."""
    lengths: list[Tensor] = [
        module.weight.detach().flatten(1).square().sum(1) for module in model.modules() if isinstance(module, nn.Conv2d)
    ]
    return float(torch.cat(lengths).median())


def as_short_victim(demo: Path, folder: Path) -> Path:
    """The demo as ``bshub attack`` leaves a model, with shorter filters.

    Args:
        demo: From :func:`demo.as_victim`.
        folder: Where; kept if it is there.

    Returns:
        The folder. Its record says how long the filters are and were.
    """
    if folder.exists():
        return folder
    source = load_model(str(demo))
    short = shortened(source.module.eval(), source.preprocessing.input_size)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(demo, partial)
    write_weights(partial / WEIGHTS, short)
    record = json.loads((partial / "training.json").read_text(encoding="utf-8"))
    record["squared_length"] = {"before": squared_length(source.module), "after": squared_length(short)}
    (partial / "training.json").write_text(json.dumps(record), encoding="utf-8")
    partial.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="holds train/; for the names of the images that were poisoned")
    args = parser.parse_args()
    demo = as_victim(args.zoo / "demo", args.data / "train" if args.data else None)
    print(as_short_victim(demo, args.zoo / SHORT))


if __name__ == "__main__":
    main()
