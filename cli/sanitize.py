"""``bshub sanitize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bshub.errors import printable
from bshub_cli import _options as options
from bshub_cli._errors import reported
from bshub_cli._output import (
    Bars,
    big,
    print_json,
    print_table,
    print_warnings,
    say,
    say_images,
    say_search,
    say_shrink,
    seconds_text,
    size_text,
    threshold_text,
)


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
    classes: options.Classes = None,
    unlabelled: options.Unlabelled = False,
    method: Annotated[
        str, typer.Option(help="bshub, paper, or a baseline: anp, awm, bnp, clp, ft, … (for comparison).")
    ] = "bshub",
    effort: Annotated[float, typer.Option(help="Share of a baseline's published iterations.")] = 1.0,
    score: options.ScoreName = "tac",
    mu: options.Mu = "auto",
    budget: options.Budget = 5.0,
    shrink: options.Shrink = 0.0,
    harden: Annotated[
        bool, typer.Option("--harden", help="Where nothing is found, make the network indifferent to faint waves.")
    ] = False,
    repair: Annotated[str, typer.Option(help="distil (from the model before pruning) or finetune.")] = "distil",
    finetune_epochs: Annotated[int, typer.Option(min=0, help="Passes over the clean images.")] = 10,
    finetune_lr: Annotated[
        float, typer.Option("--finetune-lr", "--lr", help="Peak learning rate of these passes.")
    ] = 0.002,
    precision: Annotated[
        str, typer.Option(help="Of search and repair: fp32, bf16, or auto: the faster here.")
    ] = "auto",
    batch_size: options.BatchSize = 32,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Export and compare ONNX.")] = True,
    dense: Annotated[
        bool, typer.Option("--dense", help="Also write dense/: the same function at the original shapes.")
    ] = False,
    page: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html and plots/.")] = True,
    thumbnails: Annotated[
        bool | None,
        typer.Option(
            "--thumbnails/--no-thumbnails",
            help="Show clean images in report.html. [default: unless --push-to is given]",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result in the output folder.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    sign: Annotated[
        Path | None,
        typer.Option(metavar="KEY", help="Private key, PEM on P-256, P-384 or P-521, that signs the receipt."),
    ] = None,
    push_to: Annotated[str | None, typer.Option(help="Publish the result to this Hub repository.")] = None,
    private: options.Private = False,
    create_pr: options.CreatePr = False,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    config: options.Config = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Remove a model's suspicious filters with a handful of clean images, or none; write the cleaned model.

    The result is a folder: weights and config in timm's layout, ONNX, model card, metrics and a report.
    """
    with reported(debug):
        from bshub.commands import Inputs, sanitize_to_folder
        from bshub.settings import Settings
        from bshub.writing import Wishes

        settings = Settings(
            method=method,
            effort=effort,
            score=score,
            mu=options.parse_mu(mu),
            budget=budget,
            shrink=shrink,
            harden=harden,
            repair=repair,
            finetune_epochs=finetune_epochs,
            finetune_lr=finetune_lr,
            precision=precision,
            batch_size=batch_size,
            seed=seed,
            device=device,
        )
        folder = output or Path("sanitized") / _name(model)
        report = sanitize_to_folder(
            Inputs(model, arch, num_classes, clean_dir, test_dir, trigger, classes, unlabelled, config),
            settings,
            None if dry_run else folder,
            overwrite=overwrite,
            wishes=Wishes(onnx, dense, page, thumbnails, key=sign),
            push_to=push_to,
            private=private,
            create_pr=create_pr,
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
    say_search(diagnosis)
    of = f"of {diagnosis['filters']} filters in {diagnosis['pairs']} conv-BN pairs"
    if not counts["flagged"]:
        say(f"0 {of}: {threshold_text(diagnosis)}.")
    else:
        say(
            f"{counts['flagged']} {of} score above {threshold['mu']:g} deviations from their layer's mean "
            f"({diagnosis['score']}; {threshold['reason']})."
        )
        say(
            f"{counts['removed']} would leave physically, {counts['silenced']} would be silenced in place, "
            f"{counts['followers']} would follow."
        )
        rows = [
            [layer, str(len(index)), ", ".join(map(str, index[:8])) + (" …" if len(index) > 8 else "")]
            for layer, index in diagnosis["flagged"].items()
        ]
        print_table("flagged filters", ["layer", "count", "filters"], rows)
    say_shrink(report, diagnosis["filters"], "would be removed")
    say_images(report)
    say(seconds_text(report["seconds"]))


def _show(report: dict[str, Any]) -> None:
    from bshub.release.card import lost_text, rate_text
    from bshub.release.wording import hardened, images_name, made_up
    from bshub.settings import OURS

    print_warnings(report["warnings"])
    diagnosis, counts = report["diagnosis"], report["counts"]
    rows: list[list[str]] = [
        ["filters scored", big(diagnosis["filters"]), ""],
        ["  flagged", "", big(counts["flagged"])],
        [
            "  removed",
            "",
            big(counts["removed"]) + (f" (+{counts['followers']} followers)" if counts["followers"] else ""),
        ],
        ["  silenced in place", "", big(counts["silenced"])],
        *([["  spare, removed", "", big(counts["spare"])]] if "shrink" in report else []),
        ["parameters", big(report["parameters"]["before"]), big(report["parameters"]["after"])],
        ["MACs per image", big(report["macs"]["before"]), big(report["macs"]["after"])],
        ["weights", size_text(report["bytes"]["before"]), size_text(report["bytes"]["after"])],
    ]
    evaluation = report.get("evaluation")
    for key, title in (("accuracy", "accuracy %"), ("asr", "attack success %"), ("ra", "robust accuracy %")):
        if evaluation and key in evaluation["before"]:
            rows.append([title, rate_text(evaluation["before"][key]), rate_text(evaluation["after"][key])])
    if evaluation and "accuracy_lost" in evaluation:
        rows.append(["accuracy lost, points", "–", lost_text(evaluation["accuracy_lost"])])
    if not evaluation:
        clean = report["clean_images"]
        rows.append(
            [
                "made-up images, as before %" if made_up(report) else "clean images %",
                rate_text(clean["accuracy_before"]),
                rate_text(clean["accuracy_after"]),
            ]
        )
    print_table(f"{report['model']['reference']}", ["", "before", "after"], rows)
    say_search(diagnosis)
    say(f"threshold: {threshold_text(diagnosis)}")
    if report["trigger_success"]:
        left = report["trigger_success"]
        say(
            f"unlearned: sharpened against the network, the inverted triggers lead {100 * left['before']:.0f} % of the "
            f"{images_name(report)} to their class before the repair, {100 * left['after']:.0f} % after it"
        )
    elif hardened(report):
        say(f"nothing was found: {report['repair']}")
    elif not report["repaired"] and report["settings"]["method"] in OURS:
        say(f"no repair: {report['repair']}")
    say_shrink(report, diagnosis["filters"], "were removed")
    typer.echo(
        f"proof: the small network equals the masked one to {report['proof']['error']:.1e} "
        f"({report['proof']['dtype']}, {report['proof']['images']} images)"
    )
    if "onnx" in report:
        size = size_text(report["onnx"]["bytes"])
        typer.echo(f"onnx: equals torch to {report['onnx']['error']:.1e} of the largest logit, {size}")
    if "dense" in report:
        typer.echo(f"dense: equals the small network to {report['dense']['error']:.1e} ({report['dense']['dtype']})")
    for reason in report["refused"]:
        say(f"note: {reason}")
    say_images(report)
    say(seconds_text(report["seconds"]))
    typer.echo(f"written: {printable(report['output'], 4096)}" + (" (look at report.html)" if "page" in report else ""))
    if "published" in report:
        state = "was already there" if report["published"]["unchanged"] else "published"
        typer.echo(f"{state}: {report['published']['url']}")


def _name(model: str) -> str:
    """A folder name for a reference: its last part without options, letters that are safe anywhere."""
    last = model.partition("?")[0].rstrip("/").replace("\\", "/").rpartition("/")[2]
    return "".join(ch if ch.isalnum() or ch in "._-" else "_" for ch in last).strip(".") or "model"
