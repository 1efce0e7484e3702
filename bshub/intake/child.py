"""A process of its own for bytes that may bite: it gets no secrets, no graphics card, and a limited time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_VERDICT_BYTES = 8192


def run_child(module: str, arguments: Sequence[str], folder: Path, seconds: float) -> tuple[int, bytes]:
    """Run a module of ours in a child process; what it prints is its verdict.

    Args:
        module: Its dotted name.
        arguments: On its command line.
        folder: An empty folder of ours: where it runs, and for its temporary files.
        seconds: After which it is killed.

    Returns:
        Its exit status, and the beginning of what it printed.

    Raises:
        OSError: It could not be started.
        subprocess.TimeoutExpired: It was killed.
    """
    verdict = folder / "verdict.json"
    with verdict.open("wb") as out:
        child = subprocess.run(
            [sys.executable, "-P", "-B", "-W", "ignore", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
            env=child_environment(folder),
            cwd=folder,
            timeout=seconds,
            check=False,
        )
    with verdict.open("rb") as answer:
        return child.returncode, answer.read(_VERDICT_BYTES)


def child_environment(folder: Path) -> dict[str, str]:
    """What a child is told of this process: tokens stay here, and no ``TORCH_*`` switch can weaken it.

    Args:
        folder: For its temporary files.
    """
    keep = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    searched = [str(Path(__file__).resolve().parents[2])]
    searched += [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    return {
        **{key: os.environ[key] for key in keep if key in os.environ},
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder)),
        "PYTHONPATH": os.pathsep.join(searched),
        "PYTHONUTF8": "1",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "CUDA_VISIBLE_DEVICES": "",
    }


def refusal(verdict: bytes) -> tuple[str, str] | None:
    """Message and hint of a child that said why it refused; None if it said nothing that can be read.

    Args:
        verdict: What it printed.
    """
    try:
        told = json.loads(verdict)
        return str(told["message"]), str(told["hint"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
