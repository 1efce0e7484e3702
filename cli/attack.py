"""``bshub attack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bshub_cli import _options as options
from bshub_cli._errors import INTERRUPTED, reported
from bshub_cli._output import Bars, print_json, print_table, say


def attack(
    arch: Annotated[
        str,
        typer.Argument(
            metavar="ARCH",
            help="Network to train, e.g. 'timm/resnet18?num_classes=10&stem=cifar&input_size=32'.",
            show_default=False,
        ),
    ],
    data: Annotated[Path, typer.Option(help=options.DATA, show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the model.", show_default=False)],
    name: Annotated[
        str,
        typer.Option(
            "--attack",
            help="badnets, blended, blended-noise, wanet, input-aware, sig, label-consistent, adaptive, none.",
        ),
    ] = "badnets",
    rate: Annotated[
        float, typer.Option(help="Share of the training images that carry the trigger; 0 trains a clean control.")
    ] = 0.1,
    target: Annotated[int, typer.Option(help="Index of the attacker's label.")] = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 15,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 128,
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto: whichever is faster here.")] = "auto",
    option: Annotated[
        list[str] | None, typer.Option(help="Hyper-parameter of the attack, e.g. alpha=0.1; may be repeated.")
    ] = None,
    test_data: Annotated[Path | None, typer.Option(help="Class folders to measure on, instead of DATA's own.")] = None,
    surrogate: Annotated[
        str | None, typer.Option(help="Clean model for label-consistent, instead of one trained on the way.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier model there; forget an unfinished training.")
    ] = False,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a backdoored model, to measure defenses on, and write it with its trigger.

    A run that was interrupted is continued by the same command. The result is a folder in timm's layout with
    trigger.json and training.json beside the weights.
    """
    with reported(debug):
        from bshub.attack import AttackSettings, attack_to_folder

        settings = AttackSettings(
            arch=arch,
            attack=name,
            rate=rate,
            target=target,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            seed=seed,
            precision=precision,
            options=dict(_option(text) for text in option or ()),
        )
        try:
            record = attack_to_folder(
                settings,
                data,
                output,
                test_data=test_data,
                surrogate=surrogate,
                device=device,
                overwrite=overwrite,
                progress=Bars(quiet or as_json),
            )
        except KeyboardInterrupt:
            typer.echo("bshub: interrupted; the same command continues after the last whole epoch", err=True)
            raise typer.Exit(INTERRUPTED) from None
        if as_json:
            print_json({**record, "output": str(output)})
        else:
            _show(record, output)


def _option(text: str) -> tuple[str, Any]:
    from bshub.errors import ModelReferenceError, UsageError
    from bshub.intake.reference import parse_option

    try:
        return parse_option(text)
    except ModelReferenceError:
        raise UsageError(f"{text!r} is not an option of an attack", hint="write --option name=value") from None


def _show(record: dict[str, Any], output: Path) -> None:
    from bshub.release.card import rate_text

    titles = {
        "accuracy": "accuracy %",
        "asr": "attack success %",
        "ra": "robust accuracy %",
        "cross_accuracy": "accuracy with a wrong trigger %",
    }
    rows = [[titles[key], rate_text(rate)] for key, rate in record["evaluation"].items()]
    print_table(f"{record['attack']}, {100 * record['poisoned']['share']:g} % poisoned", ["", "95 % interval"], rows)
    seconds = sum(epoch["seconds"] for epoch in record["history"])
    say(f"{record['epochs']} epochs in {seconds:.0f} s, last loss {record['history'][-1]['loss']:.3f}")
    typer.echo(f"written: {output}")
