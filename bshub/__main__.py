"""``python -m bshub``: the command line, also for ``accelerate launch -m bshub``, where one process speaks for all."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

from bshub.parallel import several

TOGETHER = ("sanitize", "scan")


def main() -> None:
    """Run the command; of several processes only the first writes to the terminal, the others only their errors."""
    from bshub_cli.start import main as run

    sys.argv[0] = "bshub"
    if several():
        if sys.argv[1:2] and sys.argv[1] not in TOGETHER:
            if os.environ.get("RANK") == "0":
                print(f"bshub: {sys.argv[1]} runs in one process: call it without the launcher", file=sys.stderr)
            sys.exit(2)
        if os.environ.get("RANK") != "0":
            _quietly(run)
            return
    run()


def _quietly(run: Callable[[], None]) -> None:
    """Run a command that says nothing unless it fails."""
    told, terminal = io.StringIO(), sys.stderr
    sys.stdout, sys.stderr = io.StringIO(), told
    try:
        run()
    except SystemExit as end:
        if end.code:
            terminal.write(told.getvalue())
        raise


if __name__ == "__main__":
    main()
