"""``bshub doctor``."""

from __future__ import annotations

import typer

from bshub_cli import _options as options
from bshub_cli._errors import reported
from bshub_cli._output import print_json, print_table, say

_SIGNS = {"ok": "ok", "note": "–", "unknown": "UNKNOWN", "failed": "FAILED"}


def doctor(as_json: options.AsJson = False, debug: options.Debug = False) -> None:
    """Look at this installation: versions, devices, ONNX, folders, the Hub and the login. Changes nothing.

    Exit codes: 0 all is well, 1 something that every run needs is broken, 3 the Hub could not be asked.
    """
    with reported(debug):
        from bshub.doctor import examine

        seen = examine()
        if as_json:
            print_json(seen.as_dict())
        else:
            rows = [[item.name, _SIGNS[item.state], item.text] for item in seen.observations]
            print_table("bshub doctor", ["check", "", "seen"], rows, words=(0, 1, 2))
            for item in seen.observations:
                if item.hint:
                    say(f"{item.name}: {item.hint}")
        raise typer.Exit(seen.code)
