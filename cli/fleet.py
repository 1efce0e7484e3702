"""``bshub fleet``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bshub_cli import _options as options
from bshub_cli._errors import reported
from bshub_cli._output import Bars, print_json, print_table, say


def fleet(
    models: Annotated[Path, typer.Argument(help="Text, one model a line: REFERENCE [--arch ARCH] [--num-classes N].")],
    clean_dir: Annotated[Path, typer.Option(help="Clean images for all of them, one folder per class.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder, or a URL such as s3://bucket/prefix.")],
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. [default: this machine]")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Models at once on this machine.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each model.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each model, also a share of one.")] = 0.0,
    memory: Annotated[float | None, typer.Option(min=0.1, help="GiB that one model may take.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one model may take.")] = 3600.0,
    retries: Annotated[int, typer.Option(min=0, help="How often a model is tried again whose worker died.")] = 2,
    test_dir: options.TestDir = None,
    unlabelled: options.Unlabelled = False,
    score: options.ScoreName = "tac",
    mu: options.Mu = "auto",
    budget: options.Budget = 5.0,
    batch_size: options.BatchSize = 32,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Export and compare ONNX.")] = True,
    page: Annotated[bool, typer.Option("--report/--no-report", help="Write each report.html.")] = True,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    config: options.Config = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Sanitize many models; a rerun goes on where the last one was stopped.

    Exit code 0: every model has its artifact; 1: some were refused or failed, and the table says why.
    """
    with reported(debug):
        from bshub.fleet.command import fleet as run
        from bshub.fleet.driver import Cluster
        from bshub.settings import Settings

        settings = Settings(
            score=score, mu=options.parse_mu(mu), budget=budget, batch_size=batch_size, seed=seed, device=device
        )
        report = run(
            models,
            clean_dir,
            output,
            settings,
            Cluster(address, workers, retries, timeout, gpus),
            test_dir=test_dir,
            onnx=onnx,
            page=page,
            unlabelled=unlabelled,
            threads=threads,
            memory_gib=memory,
            progress=Bars(quiet or as_json),
        )
        bad = [row for row in report["rows"] if row["state"] in ("refused", "failed")]
        if as_json:
            print_json(report)
        else:
            print_table("fleet", ["state", "models"], [[k, str(v)] for k, v in sorted(report["states"].items())])
            for row in bad[:20]:
                say(f"{row['state']}: {row['reference']}: {row['reason']}")
            typer.echo(f"written: {output} (look at fleet.html)")
        raise typer.Exit(1 if bad else 0)
