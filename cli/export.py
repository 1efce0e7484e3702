"""``bshub export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bshub_cli import _options as options
from bshub_cli._errors import reported
from bshub_cli._output import Bars, print_json, print_table, say, seconds_text, size_text


def export(
    model: options.Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, ending in .onnx.")],
    clean_dir: options.CleanDir = None,
    test_dir: options.TestDir = None,
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise; calibrated on the clean images.")] = False,
    budget: Annotated[float, typer.Option(help="Points of accuracy that int8 may cost; else no file.")] = 2.0,
    with_preprocessing: Annotated[
        bool, typer.Option("--with-preprocessing", help="Take uint8 pictures of any size; resize in the graph.")
    ] = False,
    opset: Annotated[int | None, typer.Option(min=1, help="ONNX opset. [default: the exporter's own]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a model as one ONNX file that was checked and compared with torch.

    Class names and preprocessing are embedded. Without clean images the comparison runs on noise.
    """
    with reported(debug):
        from bshub.export import ExportWishes, export_reference
        from bshub.inputs import Inputs

        report = export_reference(
            Inputs(model, arch, num_classes, clean_dir, test_dir),
            output,
            ExportWishes(opset, int8, with_preprocessing, budget),
            overwrite=overwrite,
            progress=Bars(quiet or as_json),
        )
        if as_json:
            print_json(report)
        else:
            _show(report)


def _show(report: dict[str, Any]) -> None:
    from bshub.release.card import rate_text

    parity, images = report["parity"], report["images"]
    kind = "images of noise" if images["kind"] == "noise" else images["kind"]
    rows = [
        [
            "compared with torch on",
            f"{images['n']} {kind}",
        ],
        ["largest difference", f"{parity['error']:.1e} of the largest logit"],
        ["opset", str(parity["opset"])],
    ]
    if int8 := report.get("int8"):
        rows += [
            ["accuracy, float", rate_text(int8["before"])],
            [f"accuracy, int8 ({int8['bits']} bits of a weight)", rate_text(int8["after"])],
            ["same answers", rate_text(int8["agreement"])],
        ]
    if inside := report.get("preprocessing"):
        rows.append(["preprocessing in the graph", f"differs by {inside['error']:.1e}"])
    print_table(report["model"]["reference"], ["check", "result"], rows)
    say(seconds_text(report["seconds"]))
    typer.echo(f"written: {report['file']['path']} ({size_text(report['file']['bytes'])})")
