"""Experiment 4: the default and the paper's method by the number of clean images, and by the share of poisoned ones."""

from __future__ import annotations

from typing import Any

from bshub.benchmark.page import DASH, number
from bshub.benchmark.summary import Group, accuracy_drop, rate

RATES_AT = 10  # images per class of the table of poison rates


def counts_table(found: list[Group], wanted: Any) -> list[str]:
    """Lines of Markdown.

    Args:
        found: Groups of the experiment.
        wanted: The experiment.
    """
    table = [
        "Mean over the draws of ASR after / ACC lost.",
        "",
        f"| model | method | {' | '.join(f'{count} per class' for count in wanted.per_class)} |",
        "|---|---|" + "---|" * len(wanted.per_class),
    ]
    cells = {(g.model, g.method, g.per_class): g for g in found if g.rows}
    for model, method in sorted({key[:2] for key in cells}):
        row = []
        for count in wanted.per_class:
            group = cells.get((model, method, count))
            asr = group and group.mean(rate("after", "asr"))
            row.append(f"{number(asr)} / {number(group.mean(accuracy_drop))}" if group else DASH)
        table.append(f"| {model} | {method} | {' | '.join(row)} |")
    return [*table, "", *_poison_rates(found)]


def _poison_rates(found: list[Group]) -> list[str]:
    """Our default by attack and poison rate."""
    mine = [g for g in found if g.method == "bshub" and g.per_class == RATES_AT and g.rows]
    by_rate = {(g.rows[0]["attack"], g.rows[0]["rate"]): g for g in mine}
    rates = sorted({key[1] for key in by_rate})
    table = [
        "### By the share of poisoned images",
        "",
        f"`bshub`, {RATES_AT} images per class: ASR before → after / ACC lost.",
        "",
        f"| attack | {' | '.join(f'{100 * share:g} %' for share in rates)} |",
        "|---|" + "---|" * len(rates),
    ]
    for attack in dict.fromkeys(key[0] for key in by_rate):
        cells = []
        for share in rates:
            group = by_rate.get((attack, share))
            if group:
                before, after = (number(group.mean(rate(when, "asr"))) for when in ("before", "after"))
                cells.append(f"{before} → {after} / {number(group.mean(accuracy_drop))}")
            else:
                cells.append(DASH)
        table.append(f"| {attack} | {' | '.join(cells)} |")
    return table
