"""``bshub gate``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bshub_cli import _options as options
from bshub_cli._errors import reported
from bshub_cli._output import Bars, print_json

if TYPE_CHECKING:
    from bshub.release.finding import Verdict

Key = Annotated[Path | None, typer.Option(help="Public key, PEM, that must have signed the receipt.")]
Sarif = Annotated[Path | None, typer.Option(help="Also write the findings as SARIF 2.1.0.")]
Junit = Annotated[Path | None, typer.Option(help="Also write the findings as JUnit XML.")]
_SIGNS = {"pass": "ok", "note": "–", "inconclusive": "INCONCLUSIVE", "refused": "REFUSED"}


def gate(
    artifact: Annotated[
        Path | None,
        typer.Argument(
            metavar="ARTIFACT",
            help="Folder that bshub sanitize wrote, or a file in it; any other model or ONNX file is refused.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="What is asked, in TOML. [default: what --init writes]")] = None,
    policy_sha256: Annotated[
        str | None, typer.Option("--policy-sha256", help="Digest that the policy must have; another one is refused.")
    ] = None,
    init: Annotated[bool, typer.Option("--init", help="Write a commented policy.toml and stop.")] = False,
    key: Key = None,
    measure: Annotated[bool, typer.Option("--measure", help="Load the weights and measure again.")] = False,
    test_dir: options.TestDir = None,
    clean_dir: Annotated[Path | None, typer.Option(help="The same, where there is no --test-dir.")] = None,
    trigger: options.TriggerFile = None,
    sarif: Sarif = None,
    junit: Junit = None,
    batch_size: options.BatchSize = 32,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Say whether an artifact may ship: its files, its signature, and what the policy asks.

    Reads only the receipt, in a fraction of a second; with --measure or images it measures again. Exit codes:
    0 it may, 1 it may not, 2 it could not be looked at, 3 something that the policy asks was never measured.
    """
    with reported(debug):
        from bshub.errors import UsageError
        from bshub.gate import gate as judge
        from bshub.gate import write_policy
        from bshub.release.policy import read_policy

        if init:
            place = policy or Path("policy.toml")
            write_policy(place)
            typer.echo(f"written: {place}")
            return
        if artifact is None:
            raise UsageError("gate needs an artifact", hint="bshub gate FOLDER, or bshub gate --init for a policy")
        verdict = judge(
            artifact,
            read_policy(policy),
            key=key,
            policy_sha256=policy_sha256,
            measure=measure,
            test_dir=test_dir,
            clean_dir=clean_dir,
            trigger=trigger,
            device=device,
            batch_size=batch_size,
            progress=Bars(quiet or as_json),
        )
        finish(verdict, as_json, sarif, junit)


def finish(verdict: Verdict, as_json: bool, sarif: Path | None, junit: Path | None) -> None:
    """Print a verdict, write it in the forms that were asked for, and leave with its code."""
    from bshub.errors import printable

    if as_json:
        print_json(verdict.as_dict())
    else:
        _show(verdict)
    if sarif is not None:
        from bshub import __version__
        from bshub.files import json_text
        from bshub.release.sarif import sarif as as_sarif

        _write(sarif, json_text(as_sarif(verdict, __version__)))
    if junit is not None:
        from bshub.release.junit import junit as as_junit

        _write(junit, as_junit(verdict))
    if not as_json:
        typer.echo(f"{verdict.word}: {printable(verdict.artifact, 4096)}")
    raise typer.Exit(verdict.code)


def _show(verdict: Verdict) -> None:
    """A table without rich, whose import would take longer than the look at the receipt."""
    from bshub.release.finding import INCONCLUSIVE, REFUSED, worst_first

    typer.echo(f"gate, {verdict.depth}, policy {verdict.policy['origin']}")
    width = max((len(item.rule) for item in verdict.findings), default=0)
    for item in worst_first(verdict.findings):
        head = f"  {_SIGNS[item.level]:<12}  {item.rule:<{width}}  "
        lines = [(head, item.message)]
        if item.level in (REFUSED, INCONCLUSIVE) and item.hint:
            lines.append(("    → ", item.hint))  # near the margin: a command to copy should not be broken
        for start, text in lines:
            indent = " " * len(start)
            wrap = textwrap.TextWrapper(80, initial_indent=start, subsequent_indent=indent)
            wrap.break_long_words = wrap.break_on_hyphens = False
            typer.echo(wrap.fill(text))


def _write(path: Path, text: str) -> None:
    from bshub.errors import OutputError
    from bshub.files import output_file

    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/stdout
            path.write_text(text, encoding="utf-8")
            return
        with output_file(path) as place:
            place.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{path} cannot be written: {reason}", hint="choose another file") from None
