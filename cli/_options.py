"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm/NAME, torchvision/NAME, user/repo, a folder, or a weights file with --arch.",
        show_default=False,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(help="Architecture of a weights file, e.g. 'timm/resnet18?num_classes=10&stem=cifar'."),
]
NumClasses = Annotated[int | None, typer.Option(min=2, help="Number of classes, where nothing else states it.")]
CleanDir = Annotated[Path | None, typer.Option(help="Clean images, one folder per class; ten per class will do.")]
TestDir = Annotated[Path | None, typer.Option(help="Images to measure on, one folder per class.")]
TriggerFile = Annotated[
    Path | None, typer.Option("--trigger", help="Trigger file; used only to measure the attack success rate.")
]
ScoreName = Annotated[
    str, typer.Option("--score", help="How filters are judged: lipschitz, bss, clp, lone, dormant, bn-shift.")
]
Mu = Annotated[str, typer.Option(help="Threshold in standard deviations above a layer's mean, or auto.")]
Budget = Annotated[
    float,
    typer.Option(help="Points of accuracy on the clean images that pruning may cost before the repair (mu auto)."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Debug = Annotated[bool, typer.Option(help="Show the traceback of an error.")]


def parse_mu(text: str) -> float | str:
    """``auto`` or a number; what is neither is refused by the settings."""
    try:
        return float(text)
    except ValueError:
        return text
