"""Measure what bshub costs, beside what it is compared with, and write ``docs/performance.md``.

    python examples/benchmark/speed.py --out docs/performance.md [--only statistics …] [--check]

Each part runs in turns in one process and one thread, in CPU seconds, so that whatever else the machine does falls on
both sides; peak memory is taken in a process of its own per figure. Rows go to ``performance.jsonl`` beside the page;
``--only`` renews a part; one that cannot be measured here stays as it is. ``--check`` runs the cheap parts on small
networks and fails where a ratio is out of bounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands_speed
import defense_speed
import fleet_speed
import full_width
import look_speed
import onnx_speed
import torch
from performance_page import page

from bshub.device import has_bf16, processors

PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "statistics": look_speed.statistics_rows,
    "memory": look_speed.memory_rows,
    "spectral": look_speed.spectral_rows,
    "defenses": defense_speed.defense_rows,
    "full width": full_width.full_width_rows,
    "precision": defense_speed.precision_rows,
    "onnx": onnx_speed.onnx_rows,
    "commands": commands_speed.command_rows,
    "fleet": fleet_speed.fleet_rows,
}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    vectors = torch.backends.cpu.get_cpu_capability() + (" with bf16" if has_bf16(torch.device("cpu")) else "")
    return {
        "processor": model or platform.machine(),
        "vectors": vectors,
        "cores": processors(),
        "torch": torch.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(PARTS))
    parser.add_argument("--check", action="store_true", help="cheap ratios only, against generous bounds")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.check:
        sys.exit(look_speed.check())
    if args.out is None:
        parser.error("--out FILE is needed")
    store = args.out.with_suffix(".jsonl")
    rows = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    for part in args.only or PARTS:
        found = [{"part": part, "machine": machine(), **row} for row in PARTS[part]()]
        if not found:
            print(f"{part}: cannot be measured here, and stays as it is", file=sys.stderr)
            continue
        rows = [row for row in rows if row["part"] != part] + found
        store.write_text("".join(json.dumps(row) + "\n" for row in rows))
        args.out.write_text(page(rows), encoding="utf-8")
        print(part, json.dumps(found), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
