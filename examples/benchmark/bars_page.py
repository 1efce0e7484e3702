"""What was asked for beside what was measured: a row a set of models, each figure with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from hardening_page import HARDENED

from bshub.benchmark.page import DASH, number
from bshub.benchmark.summary import Group, Line, Row, lines, mean, rate

CHOSEN_ON = (  # every knob was turned on these alone
    "clean", "badnets-10", "badnets-1", "blended-10", "wanet-10", "sig-10", "label-consistent-10", "label-consistent-1",
)  # fmt: skip
TOOK = 90.0  # ASR before, in percent, from which an attack is one
ADAPTIVE = "adaptive-10"
BARS = {  # mean ASR, worst ASR, ACC lost, clean model
    10: ("≤ 3", "≤ 10", "≤ 2.0", "≤ 0.5"),
    1: ("≤ 8", "≤ 25", "≤ 4.0", "≤ 1.0"),
    0: ("≤ 30", DASH, "≤ 3.0", "≤ 1.0"),
}
INTERVALS = (
    "In brackets 95 % over the test images ({n}): Wilson's of an ASR, of ACC lost that of paired answers (Agresti and "
    "Min, 2005). All models are tested on the same images, so of a mean they are the means of the models' own ends, as "
    "wide as if all erred together."
)
Ends = tuple[float, float]


def bars(found: Sequence[Group], counts: Sequence[int]) -> list[str]:
    """A table with a line of what was asked for, and one a set of models, for each number of images."""
    head = "images per class", "which", "models", "mean ASR before", "mean ASR", "worst ASR", "ACC lost", "clean model"
    table = [f"| {' | '.join(head)} | DER | seconds |", "|---" * 10 + "|"]
    hardened = {(g.model, g.per_class): replace(g, method="bshub") for g in found if g.method == HARDENED and g.rows}
    for count in counts:
        mine = [g for g in found if g.method == "bshub" and g.per_class == count and g.rows]
        if not mine:
            continue
        table.append(f"| {count or 'none'} | **bar** | 12 | – | {' | '.join(BARS[count])} | – | – |")
        for name, models in _sets(mine).items():
            table.append(_row(count, name, mine, models))
            swapped = [hardened.get((g.model, g.per_class), g) for g in mine]
            if name == "all attacked" and swapped != mine:
                table.append(_row(count, "*--harden*", swapped, models))
    return table


def about_intervals(found: Sequence[Group]) -> str:
    """What the brackets are, with the numbers of test images of these rows."""
    kinds = {"ACC": "accuracy", "ASR": "asr"}
    counted = {
        name: sorted({row["after"][key]["n"] for g in found for row in g.rows if row["after"].get(key)})
        for name, key in kinds.items()
    }
    n = "; ".join(f"{name}: n={', '.join(f'{count:,}' for count in ns)}" for name, ns in counted.items() if ns)
    return INTERVALS.format(n=n)


def figures(line: Line, groups: Sequence[Group]) -> str:
    """Cells of a line: mean ASR, worst ASR, ACC lost, the same of clean models, DER, seconds.

    Args:
        line: Of one method.
        groups: What it was made of.
    """
    attacked = [g for g in groups if g.attacked]
    innocent = [g for g in groups if not g.attacked]
    worst = [g for g in attacked if g.mean(rate("after", "asr")) == line.worst][:1]
    cells = [
        _between(line.asr, attacked, _asr_ends),
        _between(line.worst, worst, _asr_ends),
        _between(line.drop, attacked, _lost_ends),
        _between(line.control, innocent, _lost_ends),
    ]
    return " | ".join([*cells, number(line.der, 3), number(line.seconds)])


def _between(value: float | None, groups: Iterable[Group], ends: Callable[[Row], Ends | None]) -> str:
    """``7.0 [6.1, 8.1]``; without brackets where a row does not tell its ends."""
    found = [[ends(row) for row in group.rows] for group in groups]
    if value is None or not found or any(pair is None for pairs in found for pair in pairs):
        return number(value)
    low, high = (mean(mean(pair[side] for pair in pairs if pair) for pairs in found) for side in (0, 1))
    return f"{number(value)} [{number(low)}, {number(high)}]"


def _asr_ends(row: Row) -> Ends | None:
    asr = row["after"]["asr"]
    return (asr["low"], asr["high"]) if "low" in asr else None


def _lost_ends(row: Row) -> Ends | None:
    lost = row.get("accuracy_lost")
    return (lost["low"], lost["high"]) if lost else None


def _sets(mine: Sequence[Group]) -> dict[str, set[str]]:
    """Name → attacked models."""
    attacked = {g.model for g in mine if g.attacked} - {ADAPTIVE}
    took = {g.model for g in mine if (g.mean(rate("before", "asr")) or 0) >= TOOK}
    others = attacked - set(CHOSEN_ON)
    sets = {
        "all attacked": attacked,
        "chosen on": attacked & set(CHOSEN_ON),
        "others": others if others != attacked else set(),
        "others that took": others & took,
        "adaptive": {g.model for g in mine} & {ADAPTIVE},
    }
    return {name: models for name, models in sets.items() if models}


def _row(count: int, name: str, mine: Sequence[Group], models: set[str]) -> str:
    """A set of attacked models, with the innocent ones for the column of their own."""
    before = mean(g.mean(rate("before", "asr")) for g in mine if g.model in models)
    innocent = {g.model for g in mine if not g.attacked}
    shown = [g for g in mine if g.model in models | innocent]
    (line,) = lines(shown, count)
    return f"| {count or 'none'} | {name} | {line.models} | {number(before)} | {figures(line, shown)} |"
