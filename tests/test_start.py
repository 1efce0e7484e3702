"""The entry point: the short way of gate and verify reads a command line as typer does, or leaves it to typer."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Artifact
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command

from bshub_cli import _plainly
from bshub_cli.gate import gate
from bshub_cli.main import app
from bshub_cli.verify import verify

COMMANDS = {"gate": gate, "verify": verify}
WORDS = """
artifact a/b=c --policy --policy=p.toml --policy-sha256 --init --key --key=k.pem --measure --test-dir --clean-dir
--trigger --sarif --junit --batch-size --batch-size=8 --batch-size=0 --device cpu 7 0 -3 1.5 ٣ --json --quiet -q -qh
--debug --no-debug --debug=1 -- - --help -h --polic --sarif= ä --no-such
""".split()  # noqa: SIM905


def typers_view(name: str, words: list[str]) -> dict[str, Any]:
    """What typer makes of the words, defaults included."""
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    return command.make_context(name, list(words)).params


def told(command: Callable[..., None], words: list[str]) -> dict[str, Any] | None:
    """The same by the short way."""
    found = _plainly.parse(command, words)
    if found is None:
        return None
    return {name: found.get(name, place.default) for name, place in inspect.signature(command).parameters.items()}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(COMMANDS)), st.lists(st.sampled_from(WORDS) | st.text(max_size=6), max_size=6))
def test_the_short_way_agrees_with_typer_or_stands_aside(name: str, words: list[str]) -> None:
    found = told(COMMANDS[name], words)
    assert found is None or found == typers_view(name, words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gate", "folder"),
        ("gate", "folder --policy p.toml --key k.pem --policy-sha256 0 --json -q"),
        ("gate", "--sarif=x.sarif --junit x.xml folder --quiet"),
        ("gate", "folder --measure --test-dir t --trigger t.json --batch-size 8 --device cpu --debug"),
        ("gate", "--init --policy new.toml"),
        ("verify", "folder --key k.pem --json"),
    ],
)
def test_plain_calls_take_the_short_way(name: str, words: str) -> None:
    found = told(COMMANDS[name], words.split())
    assert found is not None and found == typers_view(name, words.split())


@pytest.mark.parametrize("words", ["gate --help", "gate x --no-such", "gate x y", "gate x --batch-size two", "verify"])
def test_what_needs_explaining_is_explained_by_typer(child_environment: dict[str, str], words: str) -> None:
    child = started(child_environment, *words.split())
    asked = words.endswith("--help")
    assert child.returncode == (0 if asked else 2)
    assert "Usage: bshub" in (child.stdout if asked else child.stderr)
    assert "Traceback" not in child.stderr


def started(
    environment: dict[str, str], *words: object, without: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the entry point as the installed script does, where some libraries are not installed."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
        "from bshub_cli.start import main\n"
        f"sys.argv = {['bshub', *map(str, words)]!r}\n"
        "try: main()\n"
        "finally:\n"
        "    if names := __import__('os').environ.get('SEEN'):\n"
        "        open(names, 'w').write(' '.join(sys.modules))\n"
    )
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


HEAVY = (
    *("torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime", "onnxscript", "safetensors", "PIL", "jinja2"),
    *("huggingface_hub", "altair", "vl_convert", "rich", "pydantic", "cyclonedx", "packageurl", "model_signing"),
)


def test_receipts_are_read_where_nothing_large_is_installed(artifact: Artifact, child_environment: dict) -> None:
    child = started(child_environment, "gate", artifact.folder, without=HEAVY)
    assert child.returncode == 0, child.stderr
    child = started(child_environment, "gate", artifact.folder, "--measure", without=HEAVY)
    assert (child.returncode, child.stdout) == (2, "")
    assert "measuring needs torch" in child.stderr and "pip install bshub" in child.stderr


@pytest.mark.parametrize("command", ["gate", "verify"])
def test_a_look_at_a_receipt_imports_nothing_heavy(
    artifact: Artifact, child_environment: dict[str, str], tmp_path: Path, command: str
) -> None:
    seen = tmp_path / "modules"
    child = started({**child_environment, "SEEN": os.fspath(seen)}, command, artifact.folder, "--json")
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout)["verdict"] == "pass"
    loaded = {name.partition(".")[0] for name in seen.read_text().split()}
    assert not loaded & set(HEAVY)
