"""``bshub sanitize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bshub_cli import _options as options
from bshub_cli._errors import reported
from bshub_cli._output import Bars, big, mega, print_json, print_table, print_warnings, say, seconds_text


def sanitize(
    model: options.Model,
    clean_dir: options.CleanDir = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the result. [default: ./sanitized/NAME]")
    ] = None,
    test_dir: options.TestDir = None,
    trigger: options.TriggerFile = None,
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    score: options.ScoreName = "lipschitz",
    mu: options.Mu = "auto",
    budget: options.Budget = 5.0,
    repair: Annotated[str, typer.Option(help="distil (from the model before pruning) or finetune.")] = "distil",
    finetune_epochs: Annotated[int, typer.Option(min=0, help="Passes over the clean images.")] = 10,
    finetune_lr: Annotated[
        float, typer.Option("--finetune-lr", "--lr", help="Peak learning rate of these passes.")
    ] = 0.002,
    batch_size: options.BatchSize = 32,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Export and compare ONNX.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result in the output folder.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    push_to: Annotated[str | None, typer.Option(help="Publish the result to this Hub repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new Hub repository private.")] = False,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Remove a model's suspicious filters with a handful of clean images; write the cleaned model.

    The result is a folder: weights and config in timm's layout, ONNX, model card, metrics and a report.
    """
    with reported(debug):
        from bshub.commands import Inputs, sanitize_to_folder
        from bshub.settings import Settings

        settings = Settings(
            score=score,
            mu=options.parse_mu(mu),
            budget=budget,
            repair=repair,
            finetune_epochs=finetune_epochs,
            finetune_lr=finetune_lr,
            batch_size=batch_size,
            seed=seed,
            device=device,
        )
        folder = output or Path("sanitized") / _name(model)
        report = sanitize_to_folder(
            Inputs(model, arch, num_classes, clean_dir, test_dir, trigger),
            settings,
            None if dry_run else folder,
            overwrite=overwrite,
            onnx=onnx,
            push_to=push_to,
            private=private,
            progress=Bars(quiet or as_json),
        )
        if not dry_run:
            report = {**report, "output": str(folder)}
        if as_json:
            print_json(report)
        elif dry_run:
            show_plan(report)
        else:
            _show(report)


def show_plan(report: dict[str, Any]) -> None:
    """The plan of a dry run or a scan: threshold, counts, flagged filters per layer."""
    diagnosis = report["diagnosis"]
    print_warnings(diagnosis["warnings"])
    threshold, counts = diagnosis["threshold"], diagnosis["counts"]
    say(
        f"{counts['flagged']} of {diagnosis['filters']} filters in {diagnosis['pairs']} conv-BN pairs lie more than "
        f"{threshold['mu']:g} deviations above their layer ({diagnosis['score']}; {threshold['reason']})."
    )
    if counts["flagged"]:
        say(
            f"{counts['removed']} would leave physically, {counts['silenced']} would be silenced in place, "
            f"{counts['followers']} would follow."
        )
        rows = [
            [layer, str(len(index)), ", ".join(map(str, index[:8])) + (" …" if len(index) > 8 else "")]
            for layer, index in diagnosis["flagged"].items()
        ]
        print_table("flagged filters", ["layer", "count", "filters"], rows)
    say(seconds_text(report["seconds"]))


def _show(report: dict[str, Any]) -> None:
    from bshub.release.card import rate_text

    print_warnings(report["warnings"])
    diagnosis, counts = report["diagnosis"], report["counts"]
    threshold = diagnosis["threshold"]
    rows: list[list[str]] = [
        ["filters scored", big(diagnosis["filters"]), ""],
        ["  flagged", "", big(counts["flagged"])],
        [
            "  removed",
            "",
            big(counts["removed"]) + (f" (+{counts['followers']} followers)" if counts["followers"] else ""),
        ],
        ["  silenced in place", "", big(counts["silenced"])],
        ["parameters", big(report["parameters"]["before"]), big(report["parameters"]["after"])],
        ["MACs per image", big(report["macs"]["before"]), big(report["macs"]["after"])],
        ["weights", mega(report["bytes"]["before"]), mega(report["bytes"]["after"])],
    ]
    evaluation = report.get("evaluation")
    for key, title in (("accuracy", "accuracy %"), ("asr", "attack success %"), ("ra", "robust accuracy %")):
        if evaluation and key in evaluation["before"]:
            rows.append([title, rate_text(evaluation["before"][key]), rate_text(evaluation["after"][key])])
    if not evaluation:
        clean = report["clean_images"]
        rows.append(["clean images %", rate_text(clean["accuracy_before"]), rate_text(clean["accuracy_after"])])
    print_table(f"{report['model']['reference']}", ["", "before", "after"], rows)
    say(f"threshold: {threshold['mu']:g} deviations ({diagnosis['score']}; {threshold['reason']})")
    typer.echo(
        f"proof: the small network equals the masked one to {report['proof']['error']:.1e} "
        f"({report['proof']['dtype']}, {report['proof']['images']} images)"
    )
    if "onnx" in report:
        typer.echo(
            f"onnx: equals torch to {report['onnx']['error']:.1e} of the largest logit, {mega(report['onnx']['bytes'])}"
        )
    for reason in report["refused"]:
        say(f"note: {reason}")
    say(seconds_text(report["seconds"]))
    typer.echo(f"written: {report['output']}")
    if "published" in report:
        state = "was already there" if report["published"]["unchanged"] else "published"
        typer.echo(f"{state}: {report['published']['url']}")


def _name(model: str) -> str:
    """A folder name for a reference: its last part without options, letters that are safe anywhere."""
    last = model.partition("?")[0].rstrip("/").replace("\\", "/").rpartition("/")[2]
    return "".join(ch if ch.isalnum() or ch in "._-" else "_" for ch in last).strip(".") or "model"
