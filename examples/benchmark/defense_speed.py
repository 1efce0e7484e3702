"""What a whole sanitize costs beside the published defenses, on the demo's model with its hundred clean images."""

from __future__ import annotations

import time
from typing import Any

import torch
from demo import demo
from look_speed import bare, cpu_seconds

from bshub.clean import CleanImages
from bshub.device import has_bf16
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.registry import find_defense
from bshub.pipeline import SanitizeResult, sanitize
from bshub.settings import Settings

# Share of the published iterations that is run, twice where it is not all of them: the rest is added in proportion.
EFFORTS: dict[str, tuple[float, ...]] = {"clp": (1,), "ft": (1,), "nad": (1,), "awm": (0.1, 0.2), "anp": (0.01, 0.02)}


def _ours(settings: Settings) -> tuple[float, SanitizeResult]:
    source, batches = demo()
    start = time.process_time()
    result = sanitize(source.module, batches, settings)
    return time.process_time() - start, result


def defense_rows() -> list[dict[str, Any]]:
    """CPU seconds of each, and their ratio to ours and to a bare forward and backward over the images."""
    source, batches = demo()
    bare(source.module, batches)
    step = cpu_seconds(lambda: bare(source.module, batches))
    seconds, result = _ours(Settings(device="cpu"))
    parts = {name: round(value, 2) for name, value in result.report["seconds"].items()}
    rows = [{"method": "bshub", "seconds": seconds, "efforts": [1], "parts": parts}]
    for name, efforts in EFFORTS.items():
        taken = [_theirs(name, effort) for effort in efforts]
        whole = taken[0]
        if len(efforts) == 2:
            per_effort = (taken[1] - taken[0]) / (efforts[1] - efforts[0])
            whole = taken[0] + per_effort * (1 - efforts[0])
        rows.append({"method": name, "seconds": whole, "efforts": list(efforts), "measured": taken})
    return [{**row, "steps": row["seconds"] / step, "ratio": row["seconds"] / seconds} for row in rows]


def _theirs(name: str, effort: float) -> float:
    source, batches = demo()
    clean = CleanImages(batches, torch.device("cpu"))
    told = DefenseSettings(seed=0, effort=effort)
    return cpu_seconds(lambda: find_defense(name)(source.module, clean, told))


def precision_rows() -> list[dict[str, Any]]:
    """Search and repair in bf16 beside float32: their time, the plan, and how many clean images stay right.

    The repair by the score of the weights: what the default prunes may cost nothing, and then there is none.
    """
    looked = {kind: _ours(Settings(device="cpu", precision=kind))[1].report for kind in ("fp32", "bf16")}
    settings = {
        precision: Settings(device="cpu", score="lipschitz", precision=precision) for precision in ("fp32", "bf16")
    }
    found = {precision: _ours(told)[1] for precision, told in settings.items()}
    full, half = found["fp32"].report, found["bf16"].report
    return [
        {
            "search_fp32": looked["fp32"]["seconds"]["trigger inversion"],
            "search_bf16": looked["bf16"]["seconds"]["trigger inversion"],
            "same_found": looked["fp32"]["diagnosis"]["flagged"] == looked["bf16"]["diagnosis"]["flagged"],
            "repair_fp32": full["seconds"]["repair"],
            "repair_bf16": half["seconds"]["repair"],
            "ratio": half["seconds"]["repair"] / full["seconds"]["repair"],
            "units": has_bf16(torch.device("cpu")),
            "same_plan": found["fp32"].plan == found["bf16"].plan,
            "accuracy_fp32": full["clean_images"]["accuracy_after"],
            "accuracy_bf16": half["clean_images"]["accuracy_after"],
        }
    ]
