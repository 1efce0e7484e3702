"""A small corner of the benchmark on the demo's model: ``python examples/benchmark/quick.py --out out/bench-quick``.

The demo's clean images are the training split, its held-out ones the test split; nothing is downloaded or trained.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from demo import DEMO, as_victim

from bshub.benchmark.command import bench_to_folder
from bshub.benchmark.grid import Grid

METHODS = ("bshub", "bshub:mu=2.0", "bshub:mu=4.0", "bshub:repair=finetune", "paper", "clp", "bnp", "ft", "nad")


def corner(folder: Path) -> tuple[Path, Path]:
    """The demo in the layout of ``bshub attack``: a victim, and data with ``train/`` and ``test/``."""
    victim, data = as_victim(folder / "demo"), folder / "data"
    if not data.exists():
        shutil.copytree(DEMO / "clean", data / "train")
        shutil.copytree(DEMO / "heldout", data / "test")
    return victim, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--per-class", nargs="+", type=int, default=(1, 10))
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--effort", type=float, default=0.25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    victim, data = corner(args.out / "corner")
    grid = Grid((victim,), data, tuple(args.methods), tuple(args.per_class), (0,), args.test_images, args.effort, "cpu")
    for row in bench_to_folder(grid, args.out):
        cell, rates = row["cell"], row.get("after", {})
        told = ", ".join(f"{name} {rate['percent']}" for name, rate in rates.items())
        print(f"{cell['method']}, {cell['per_class']} per class: {told or row.get('failed')}")
    print(f"written: {args.out}/results.md")


if __name__ == "__main__":
    main()
