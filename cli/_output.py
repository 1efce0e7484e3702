"""Human output: tables on stdout, progress on stderr."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from bshub.errors import printable


class Bars:
    """A rich progress bar per step, on stderr; finished steps stay as a line with their seconds."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        hide_hub_bars()  # two kinds of bars would write over each other

    @contextmanager
    def step(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show one step: how much of ``total``, and how long it will still take; without a total, how much."""
        if self._quiet:
            yield lambda amount: None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        counted = [BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()] if total else []
        console = Console(stderr=True)
        with Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<11}"),
            *counted,
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as progress:
            task = progress.add_task(name, total=total or 1)
            done = 0

            def count(amount: int) -> None:
                nonlocal done
                done += amount
                progress.update(task, description=f"{name} {done:,}")

            yield (lambda amount: progress.advance(task, amount)) if total else count
            progress.update(task, completed=total or 1)


def hide_hub_bars() -> None:
    """Keep the Hub's client from drawing bars; it reads this when it is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def print_json(report: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    from bshub.files import json_text

    typer.echo(json_text(report), nl=False)


def print_table(title: str, columns: list[str], rows: list[list[str]], words: tuple[int, ...] = (0,)) -> None:
    """A table of at most 80 columns on stdout; the columns ``words`` are set to the left, the others to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, width=min(console.width, 80))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def say(text: str) -> None:
    """A sentence on stdout, wrapped at 80 columns; nothing that is copied, like a path, goes through here."""
    typer.echo(textwrap.fill(text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def print_warnings(warnings: list[str]) -> None:
    """Warnings on stderr."""
    for warning in warnings:
        typer.echo(f"warning: {printable(warning)}", err=True)


def say_shrink(report: dict[str, Any], filters: int, gone: str) -> None:
    """How many useless filters go beside the suspicious ones, and why so many; nothing where none were sought."""
    if "shrink" in report:
        shrink = report["shrink"]
        spare = sum(map(len, shrink["filters"].values()))
        say(
            f"shrink: {big(spare)} spare filters {gone}, {100 * spare / filters:.1f} % of {big(filters)} where at most "
            f"{100 * shrink['asked']:g} % were asked for ({shrink['reason']})"
        )


def say_search(diagnosis: dict[str, Any]) -> None:
    """What batch norm remembers, and what the search for a trigger came to; not what the threshold says already."""
    remembered = (diagnosis.get("shifted") or {}).get("reason")
    if remembered and remembered != diagnosis["threshold"]["reason"]:
        say(f"batch norm: {remembered}")
    inversion = diagnosis["inversion"]
    if inversion and inversion["reason"] != diagnosis["threshold"]["reason"]:
        say(f"search: {inversion['reason']}")


def threshold_text(diagnosis: dict[str, Any]) -> str:
    """``2.25 deviations (tac; the highest μ at …)``, or why there is none."""
    from bshub.scoring.selection import MU_NOTHING

    threshold = diagnosis["threshold"]
    if threshold["mu"] >= MU_NOTHING:
        return f"nothing is flagged; {threshold['reason']}"
    return f"{threshold['mu']:g} deviations ({diagnosis['score']}; {threshold['reason']})"


def say_images(report: dict[str, Any]) -> None:
    """Which rule gave the labels, what the image policy changed or left out, and where settings came from."""
    images, labels = report.get("images") or {}, report["model"]["labels"]
    if labels:
        say(f"labels: {printable(labels)}")
    if images.get("converted"):
        say("converted: " + ", ".join(f"{count} {printable(what)}" for what, count in images["converted"].items()))
    if images.get("unreadable"):
        names = [printable(name, 40) for name in images["unreadable"]]
        say(f"unreadable, left out: {', '.join(names[:5])}" + (", …" if len(names) > 5 else ""))
    if "settings_file" in report:
        say(f"settings: from {printable(report['settings_file'], 80)}")


def seconds_text(seconds: dict[str, float]) -> str:
    """``load 0.4 s · trace 0.1 s · … · 9.2 s in all``."""
    parts = [f"{name} {value:.1f}" for name, value in seconds.items()]
    return "seconds: " + ", ".join(parts) + f"; {sum(seconds.values()):.1f} in all"


def big(number: int) -> str:
    """``1,594,266``."""
    return f"{number:,}"


def size_text(size: int) -> str:
    """Bytes as ``6.38 MB``, ``7.2 kB`` or ``310 B``."""
    if size >= 1e5:
        return f"{size / 1e6:.2f} MB"
    return f"{size / 1e3:.1f} kB" if size >= 1000 else f"{size} B"
