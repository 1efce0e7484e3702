"""``bshub bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bshub_cli import _options as options
from bshub_cli._errors import reported
from bshub_cli._output import Bars, print_json, print_table, say


def bench(
    models: Annotated[list[Path], typer.Argument(help="Folders that bshub attack wrote.")],
    data: Annotated[Path, typer.Option("--data", help=options.DATA)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of rows, page and plots; rows are kept.")],
    methods: Annotated[
        str, typer.Option(help="Separated by spaces: bshub, paper, anp, … each with :key=value,… where wanted.")
    ] = "bshub paper clp ft",
    per_class: Annotated[
        str, typer.Option(help="Numbers of clean images per class, separated by commas; 0: made-up ones.")
    ] = "10",
    seeds: Annotated[str, typer.Option(help="Seeds of draws and methods, separated by commas.")] = "0",
    test_images: Annotated[int | None, typer.Option(min=10, help="Measure on that many test images.")] = None,
    effort: Annotated[float, typer.Option(min=0.0, max=10.0, help="Share of the baselines' iterations.")] = 1.0,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure defenses on backdoored models; rows, a page and plots.

    Every row is written as it is finished; a rerun does the missing ones.
    """
    with reported(debug):
        from bshub.benchmark.command import bench_to_folder
        from bshub.benchmark.grid import Grid
        from bshub.benchmark.summary import groups, lines

        grid = Grid(
            tuple(models),
            data,
            tuple(methods.split()),
            options.whole_numbers("--per-class", per_class),
            options.whole_numbers("--seeds", seeds),
            test_images,
            effort,
            device,
        )
        rows = bench_to_folder(grid, output, progress=Bars(quiet or as_json))
        if as_json:
            print_json({"rows": rows})
            return
        for count in grid.per_class:
            table = [
                [
                    line.method,
                    *map(_figure, (line.asr, line.worst, line.drop)),
                    _figure(line.der, 3),
                    _figure(line.seconds),
                ]
                for line in lines(groups(rows), count)
            ]
            columns = ["method", "mean ASR", "worst", "ACC lost", "DER", "seconds"]
            print_table(f"{count} clean images per class" if count else "no clean images", columns, table)
        say(f"written: {output}")


def _figure(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
