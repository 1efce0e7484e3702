"""Walk through docs/tutorial.md and write what the terminal showed, as text.

    python examples/record_tutorial.py --out docs/recording.txt [--install]

Each command of the page is typed into a shell in the clone, as it stands there; ``--install`` includes ``make setup``.
Progress bars are left out (stderr is no terminal); paths of this machine are shortened and
pip's words on its package index left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OWN_MODEL = "## Your own model"


def commands(page: str, install: bool) -> list[str]:
    """The commands of the tutorial, in order; a Python block becomes ``python - <<'EOF'``."""
    found = []
    for kind, text in BLOCK.findall(page.split(OWN_MODEL)[0]):
        if kind == "python":
            found.append(f"python - <<'EOF'\n{text}EOF")
            continue
        for command in re.sub(r"\\\n\s*", "", text).strip().splitlines():
            if install or not command.startswith("make setup"):
                found.append(command)
    return found


def record(page: str, folder: Path, environment: dict[str, str], install: bool) -> str:
    """Type the commands in one shell; gives what was seen.

    Raises:
        RuntimeError: A command failed.
    """
    script, marks = ["set -u"], "\x1e"
    for command in commands(page, install):
        script += [f"printf '{marks}'", command, f'printf "{marks}%d" $?']
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=folder, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    parts = done.stdout.split(marks)[1:]
    lines = []
    for command, output, code in zip(commands(page, install), parts[::2], parts[1::2], strict=True):
        lines += [*(f"{'$' if not n else '>'} {line}" for n, line in enumerate(command.splitlines())), output.rstrip()]
        if int(code) not in ((0, 3) if command == "bshub doctor" else (0,)):
            raise RuntimeError(f"{command} ended with {code}:\n{output}")
        lines += [f"[exit code {code}]" * (code != "0"), ""]
    seconds = time.monotonic() - start
    text = "\n".join(line for line in lines if line is not None)
    for path, short in ((str(folder), "."), (str(Path.home()), "~"), (tempfile.gettempdir(), "/tmp")):
        text = text.replace(path, short)
    text = re.sub(r"(?m)^(?:WARNING|\[notice\]).*\n", "", text)  # pip's, on the package index of this machine
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines()))
    return f"{text.strip()}\n\n# {seconds:.0f} seconds in all, {os.cpu_count()} CPU cores, no GPU\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--install", action="store_true")
    args = parser.parse_args()
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    environment = {**os.environ, "COLUMNS": "80", "HOME": str(Path.home())}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "bshub"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if not args.install:  # the environment of this clone stands in for the one that make setup would make
            (clone / ".venv").symlink_to(ROOT / ".venv")
        text = record(page, clone, environment, args.install)
        shutil.rmtree(clone, ignore_errors=True)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
