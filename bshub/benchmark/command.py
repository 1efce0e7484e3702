"""``bshub bench``: a grid in, a folder with rows, a page and plots out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bshub.benchmark.grid import Grid, run_grid
from bshub.benchmark.page import results_page
from bshub.benchmark.plots import draw_plots
from bshub.benchmark.rows import Rows
from bshub.errors import UsageError
from bshub.progress import Progress, Steps

ROWS, PAGE = "rows.jsonl", "results.md"


def bench_to_folder(grid: Grid, output: Path, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Measure what is missing and write everything anew from all rows of the folder.

    Args:
        grid: What is asked for.
        output: Folder; rows that it holds are kept.
        progress: Shows the steps.

    Returns:
        The grid's rows, those of earlier runs included.

    Raises:
        UsageError: Something asked for cannot be used.
    """
    if not grid.per_class or min(grid.per_class) < 0 or not grid.seeds or not grid.methods or not grid.models:
        raise UsageError(
            "a benchmark needs models, methods, seeds and numbers of clean images per class",
            hint='bshub bench MODEL --data DIR --methods "bshub paper"',
        )
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is no folder", hint="name another --output")
    rows = Rows(output / ROWS)
    run_grid(grid, rows, Steps(progress))
    write_pages(output, rows)
    asked = {folder.name for folder in grid.models}
    return [row for row in rows.rows if row["cell"]["model"] in asked and row["cell"]["method"] in grid.methods]


def write_pages(output: Path, rows: Rows) -> None:
    """Page and plots from rows."""
    pictures = draw_plots(rows.rows, output)
    (output / PAGE).write_text(results_page(rows.rows, "bshub bench", pictures), encoding="utf-8")
