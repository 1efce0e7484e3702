"""Real runs of the command in processes of their own, quickly: a server that has torch loaded forks one per request.

``Runs`` starts the server; a request may ask for a signal after some seconds or before the n-th change of the file
system, or for a limit on the size of files. POSIX only.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "ctypes.dlopen")


class Runs:
    """A client of the server; a context manager.

    Args:
        environment: Of the server and of its runs.
        warm: Arguments of the run that it makes in its own process first.
    """

    def __init__(self, environment: dict[str, str], *warm: object) -> None:
        command = [sys.executable, "-m", "bad.runs", *map(str, warm)]
        self.server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        )

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.communicate()

    def start(self, *arguments: object, log: Path, **faults: Any) -> None:
        """Start a run of ``bshub ARGUMENTS``; what it prints goes to ``log``.

        Args:
            arguments: Of the command.
            log: A file.
            faults: ``signal`` with ``seconds`` or ``changes`` and ``folder``; ``limit``, the largest file in bytes.
        """
        assert self.server.stdin is not None
        request = {"arguments": [str(a) for a in arguments], "log": str(log), **faults}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()

    def wait(self) -> tuple[int, float]:
        """Exit status of the run that ends next, negative for a signal, and its seconds."""
        assert self.server.stdout is not None
        status, seconds = json.loads(self.server.stdout.readline())
        return status, seconds

    def run(self, *arguments: object, log: Path, **faults: Any) -> tuple[int, float]:
        """Start a run and wait for it."""
        self.start(*arguments, log=log, **faults)
        return self.wait()


def serve(warm: list[str], answers: TextIO) -> None:
    """Fork a run for each line; answer as they end.

    Args:
        warm: Arguments of a run in this process, which imports everything; without training, whose threads would not
            survive a fork.
        answers: Where the answers go.
    """
    from bshub_cli.main import app

    try:
        app(warm)
    except SystemExit as end:
        assert not end.code
    running = 0
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        if (child := os.fork()) == 0:
            become(request, app)
        running += 1
        if "seconds" in request:
            time.sleep(request["seconds"])
            os.kill(child, request["signal"])
        if request.get("beside"):
            continue
        while running:
            _, status = os.wait()
            running -= 1
            answers.write(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - started]) + "\n")
            answers.flush()


def become(request: dict[str, Any], app: Any) -> None:
    """In the child: set the faults up and run the command."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    if "changes" in request:
        left = request["changes"]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in CHANGES and arguments and request["folder"] in str(arguments[0]):
                left -= 1
                if left == -1:
                    os.kill(os.getpid(), request["signal"])

        sys.addaudithook(hook)
    status = 1
    try:
        app(request["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr
    serve(sys.argv[1:], answers)
