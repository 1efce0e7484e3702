"""``bshub publish``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bshub_cli import _options as options
from bshub_cli._errors import reported
from bshub_cli._output import hide_hub_bars, print_json, print_table, print_warnings, say, size_text


def publish(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that bshub sanitize wrote.")],
    repo: Annotated[str, typer.Option("--repo", help="Hub repository, user/name; made where it does not exist.")],
    private: options.Private = False,
    create_pr: options.CreatePr = False,
    revision: Annotated[str | None, typer.Option(help="An existing branch. [default: main]")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    show_images: Annotated[
        bool, typer.Option("--show-images", help="The world may see the clean images that report.html shows.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, print the card, send nothing.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Put a sanitized model on the Hub, as one commit; the same artifact again changes nothing.

    Log in once with `hf auth login`. A push by somebody else in between is never overwritten. The dense copy goes
    into a repository of its own: bshub publish ARTIFACT/dense --repo user/name-dense.
    """
    with reported(debug):
        from bshub.release import publish as hub

        if dry_run:
            plan = hub.preview(artifact, repo)
            if as_json:
                print_json(plan)
            else:
                _show_plan(plan)
            return
        if quiet or as_json or not sys.stderr.isatty():
            hide_hub_bars()  # else they show the upload, byte by byte
        done = hub.publish(
            artifact,
            repo,
            private=private,
            create_pr=create_pr,
            revision=revision,
            message=message,
            show_images=show_images,
        )
        if as_json:
            print_json(done.as_dict())
            return
        typer.echo(f"{'was already there' if done.unchanged else 'published'}: {done.url}")
        if not done.unchanged:
            typer.echo(f"commit {done.commit[:12]} with {len(done.files)} files")


def _show_plan(plan: dict[str, Any]) -> None:
    rows = [[path, size_text(size)] for path, size in plan["files"].items()]
    print_table(f"would go to {plan['repository']}", ["file", "size"], [*rows, ["in all", size_text(plan["bytes"])]])
    warnings = []
    if plan["clean_images_shown"]:
        warnings.append(
            f"report.html shows {plan['clean_images_shown']} clean images; for a public repository add --show-images"
        )
    if plan["card"] is None:
        warnings.append("there is no README.md: the repository would have no card")
    print_warnings(warnings)
    if plan["card"] is not None:
        say("README.md:")
        typer.echo(plan["card"])
