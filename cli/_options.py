"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bshub_cli._errors import reported

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
DATA = (
    "Folder of train/<class>/ and test/<class>/ (or val/<class>/), torchvision/CIFAR100?root=DIR, sklearn/digits, or "
    "hf://datasets/user/repo."
)
CleanDir = Annotated[
    Path | None,
    typer.Option(help="Clean images, one folder per class (ten each will do), or hf://datasets/user/repo[/folder]."),
]
TestDir = Annotated[Path | None, typer.Option(help="Images to measure on, one folder per class.")]
Classes = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Name of each output of the model, in order: one per line, or a JSON list."),
]
Unlabelled = Annotated[
    bool,
    typer.Option("--unlabelled", help="Take the model's own confident answers for the labels of the clean images."),
]
TriggerFile = Annotated[
    Path | None, typer.Option("--trigger", help="Trigger file; used only to measure the attack success rate.")
]
ScoreName = Annotated[
    str,
    typer.Option(
        "--score",
        help="How filters are judged: tac, lipschitz, bss, clp, lone, dormant, bn-shift.",
    ),
]
Mu = Annotated[str, typer.Option(help="Threshold in standard deviations above a layer's mean, or auto.")]
Budget = Annotated[
    float,
    typer.Option(help="Points of accuracy on the clean images that pruning may cost before the repair (mu auto)."),
]
Shrink = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="Also remove the least useful filters, at most this share (0 to 0.9) of all, as far as --budget allows.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def _settle(context: typer.Context, path: Path | None) -> Path | None:
    """Let a file of settings stand in for the defaults; options that are typed win over it."""
    if context.resilient_parsing:
        return path
    with reported(debug=False):
        from bshub.settings import find_settings, read_settings

        path = path or find_settings(Path())
        if path is not None:
            context.default_map = {**(context.default_map or {}), **read_settings(path)}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        help="File of settings. [default: ./bshub.toml, else tool.bshub in ./pyproject.toml]",
        callback=_settle,
        is_eager=True,
        show_default=False,
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make a new Hub repository private.")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Debug = Annotated[bool, typer.Option(help="Show the traceback of an error.")]


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """``1,10`` → ``(1, 10)``.

    Raises:
        UsageError: It is no list of whole numbers.
    """
    from bshub.errors import UsageError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} is a list of whole numbers like 1,10, not {text!r}", hint=f"write {option} 1,10"
        ) from None


def parse_mu(text: str) -> float | str:
    """``auto`` or a number; what is neither is refused by the settings."""
    try:
        return float(text)
    except ValueError:
        return text
