"""Rows → a table with every model, method and number of images, before and after."""

from __future__ import annotations

from typing import Any

from bshub.benchmark.page import DASH, drawn, number, rate_cell
from bshub.benchmark.rows import on_weights
from bshub.benchmark.summary import Group


def detail_table(found: list[Group], wanted: Any) -> list[str]:
    """Lines of Markdown.

    Args:
        found: Groups of the experiment.
        wanted: The experiment; the table shows whatever was measured.
    """
    table = [
        "| model | images per class | method | ACC before → after | ASR before → after | RA after | DER | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in sorted(found, key=lambda g: (g.model, g.per_class, g.method)):
        if not group.rows:
            table.append(f"| {group.model} | {_images(group)} | {group.method} | {group.failed[0]} | | | | |")
            continue
        before = group.rows[0]["before"]
        acc, asr = (f"{rate_cell(before.get(n))} → {drawn(group, n)}" for n in ("accuracy", "asr"))
        der, seconds = group.mean(lambda row: row["der"]), group.mean(lambda row: row["seconds"])
        table.append(
            f"| {group.model} | {_images(group)} | {group.method} | {acc} | {asr} | {drawn(group, 'ra')} | "
            f"{number(der, 3)} | {number(seconds)} |"
        )
    return table


def _images(group: Group) -> str:
    return DASH if on_weights(group.method) else str(group.per_class or "none")
