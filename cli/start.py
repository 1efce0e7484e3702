"""The entry point of the ``bshub`` command: two commands take a shorter way, since a hook before each push waits."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line.

    ``gate`` and ``verify``, called plainly, do without typer's machinery, whose import alone takes longer than a look
    at a receipt. All else, also their help, their mistakes and completion, goes through the app.
    """
    words = sys.argv[1:]
    if words[:1] in (["gate"], ["verify"]) and "_BSHUB_COMPLETE" not in os.environ:
        from bshub_cli import _plainly, gate, verify

        command = {"gate": gate.gate, "verify": verify.verify}[words[0]]
        told = _plainly.parse(command, words[1:])
        if told is not None:
            sys.exit(_plainly.call(command, told))
    from bshub_cli.main import app

    app()
