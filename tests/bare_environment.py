"""An environment of its own with some of the installed packages and what they need, and nothing else: no bshub.

A virtual environment whose packages are links to those of this one, so that it is made in a moment and without a
network. What is not named here, or needed by what is, cannot be imported in it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

TORCH_AND_TIMM = ("torch", "timm")
ONNXRUNTIME = ("onnxruntime", "numpy", "pillow")


def bare_python(folder: Path, packages: tuple[str, ...]) -> Path:
    """Make the environment.

    Args:
        folder: Where; made if it is not there.
        packages: Names of installed distributions.

    Returns:
        Its interpreter.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    python = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    for distribution in _with_needs(packages):
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            place = Path(distribution.locate_file(top))
            if place.exists() and not (site / top).exists():
                (site / top).symlink_to(place)
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('bshub') is not None)"
    subprocess.run([python, "-c", check], cwd=folder, env=bare_variables({}), check=True)
    return python


def bare_variables(more: dict[str, str]) -> dict[str, str]:
    """Environment variables of a child in there: nothing that leads to this one's packages."""
    return {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")} | more


def _with_needs(packages: tuple[str, ...]) -> list[metadata.Distribution]:
    found: dict[str, metadata.Distribution] = {}
    waiting = list(packages)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found[name] = _distribution(name)
        for text in found[name].requires or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)
    return list(found.values())


def _distribution(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        if name != "onnxruntime":
            raise
        return metadata.distribution("onnxruntime-gpu")  # the same module, built for another machine


if __name__ == "__main__":
    print(bare_python(Path(sys.argv[1]), tuple(sys.argv[2:])))
