"""Rows → the Markdown page of results. Every figure on it is computed here; nothing is typed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bshub.benchmark.rows import on_weights
from bshub.benchmark.summary import Group, Line, Row, groups, lines, rate

DASH = "–"


def results_page(rows: Sequence[Row], command: str, pictures: Sequence[tuple[str, str]] = ()) -> str:
    """The whole page.

    Args:
        rows: Of a benchmark.
        command: What makes them.
        pictures: (file beside the page, caption) of plots to show.
    """
    found = groups(rows)
    counts = sorted({group.per_class for group in found if not on_weights(group.method)})
    parts = [_head(rows, command)]
    parts += [_models(found)]
    for per_class in counts or [0]:
        parts.append(_methods(found, per_class))
    for file, caption in pictures:
        parts.append(f"![{caption}]({file})\n\n*{caption}*\n")
    parts += [_details(found)]
    return "\n".join(parts)


def _head(rows: Sequence[Row], command: str) -> str:
    tests = sorted({row["cell"]["test_images"] for row in rows})
    seeds = sorted({row["cell"]["seed"] for row in rows})
    threads = sorted({row["threads"] for row in rows if "threads" in row})
    return "\n".join(
        [
            "# Results of the benchmark",
            "",
            f"Generated from [rows.jsonl](rows.jsonl) ({len(rows)} rows) by `{command}`; do not edit by hand.",
            "",
            "ACC: clean test accuracy. ASR: test images of other classes that the trigger turns into the target.",
            "RA: the same images that keep their own label. DER: (fall of ASR − fall of ACC + 1) / 2. Rates in percent",
            "with a 95 % Wilson interval.",
            f"Test images: {_listed(tests)}; draws (seeds): {_listed(seeds)}; CPU threads: {_listed(threads)}.",
            "Clean images come from the training split, never a poisoned one, the same for every method; no method",
            "sees the trigger, and nothing was chosen on the test images. ×bare: seconds over those of one bare",
            "forward and backward over the same clean images in the same run. *Effort* below 1: the share of a",
            "baseline's published iterations that was run.",
            "",
        ]
    )


def _models(found: Iterable[Group]) -> str:
    table = ["## The models", "", "| model | attack | rate | ACC | ASR | RA |", "|---|---|---|---|---|---|"]
    seen = set()
    for group in sorted(found, key=lambda group: group.model):
        if group.model in seen or not group.rows:
            continue
        seen.add(group.model)
        row = group.rows[0]
        before = row["before"]
        table.append(
            f"| {group.model} | {row['attack']} | {100 * row['rate']:g} % | {rate_cell(before.get('accuracy'))} | "
            f"{rate_cell(before.get('asr'))} | {rate_cell(before.get('ra'))} |"
        )
    return "\n".join([*table, ""])


def _methods(found: Sequence[Group], per_class: int) -> str:
    summary = lines(found, per_class)
    title = f"## {per_class} clean images per class" if per_class else "## No clean images"
    table = [
        title,
        "",
        "Means over the backdoored models, each the mean of its draws; *clean model*: ACC lost on models without a",
        "backdoor.",
        "",
        "| method | models | mean ASR | worst ASR | ACC lost | clean model | DER | seconds | ×bare | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *[_line(line) for line in summary],
        "",
    ]
    return "\n".join(table)


def _line(line: Line) -> str:
    cells = [
        line.method,
        str(line.models),
        number(line.asr),
        number(line.worst),
        number(line.drop),
        number(line.control),
        number(line.der, 3),
        number(line.seconds),
        number(line.ratio, 0),
        number(line.megabytes, 0),
    ]
    return "| " + " | ".join(cells) + " |"


def _details(found: Iterable[Group]) -> str:
    table = [
        "## Every model",
        "",
        "With several draws: the mean, and in brackets the lowest and the highest draw.",
        "",
        "| model | images per class | method | effort | ACC | ASR | RA | DER | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group in sorted(found, key=lambda group: (group.model, group.per_class, group.method)):
        head = f"| {group.model} | {group.per_class or DASH} | {group.method} | {group.effort:g} |"
        if not group.rows:
            table.append(f"{head} {group.failed[0]} | | | | |")
            continue
        cells = [drawn(group, name) for name in ("accuracy", "asr", "ra")]
        der, seconds = group.mean(lambda row: row["der"]), group.mean(lambda row: row["seconds"])
        table.append(f"{head} {' | '.join(cells)} | {number(der, 3)} | {number(seconds)} |")
    return "\n".join([*table, ""])


def drawn(group: Group, name: str) -> str:
    """One draw with its interval; several with their range."""
    if len(group.rows) == 1:
        return rate_cell(group.rows[0]["after"].get(name))
    values = [value for row in group.rows if (value := rate("after", name)(row)) is not None]
    if not values:
        return DASH
    return f"{sum(values) / len(values):.1f} ({min(values):.1f}–{max(values):.1f}, {len(values)} draws)"


def rate_cell(value: dict[str, Any] | None) -> str:
    """``83.4 [80.9, 85.6]``."""
    if not value or value["percent"] is None:
        return DASH
    return f"{value['percent']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash."""
    return DASH if value is None else f"{value:.{digits}f}"


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values)) or DASH
