"""``bshub verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bshub_cli import _options as options
from bshub_cli._errors import reported
from bshub_cli.gate import Junit, Key, Sarif, finish


def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that bshub sanitize wrote.")],
    key: Key = None,
    sarif: Sarif = None,
    junit: Junit = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Check that an artifact's files are those of its receipt and, with --key, who signed it."""
    with reported(debug):
        from bshub.gate import verify as check

        finish(check(artifact, key), as_json, sarif, junit)
