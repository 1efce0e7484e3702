"""The tutorial and the README, followed to the letter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))
from record_tutorial import OWN_MODEL, commands, record

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = ("README.md", "docs", "examples", "pyproject.toml")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of a clone, with an environment where ``bshub`` and ``python`` are what the tests run."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in FILES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)  # type: ignore[operator]
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "bshub").write_text(f'#!/bin/sh\nexec {sys.executable} -c "from bshub_cli.main import app; app()" "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tools / "activate").write_text(f'PATH="{tools}:$PATH"\nexport PATH\n')
    return folder


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="the tutorial is typed into bash")
def test_the_tutorial_works_to_the_letter_and_says_what_is_seen(clone: Path, child_environment: dict[str, str]) -> None:
    # `make setup` alone is left out: it needs a network, and made the environment that runs this test.
    assert [command for command in commands(TUTORIAL, True) if command not in commands(TUTORIAL, False)] == [
        "make setup"
    ]
    environment = {**child_environment, "COLUMNS": "80"}
    seen = record(TUTORIAL, clone, environment, install=False)
    assert max(len(line) for line in seen.splitlines() if not line.startswith(("$", ">", "written:", "PASS"))) <= 80
    before, after = re.search(r"attack success %\s+([\d.]+) \[.*?\] n=\d+\s+([\d.]+) \[", seen).groups()  # type: ignore[union-attr]
    assert float(before) > 99
    assert float(after) < 5
    for name in ("report.html", "README.md", "model.onnx", "model.safetensors"):
        assert (clone / "cleaned" / name).is_file()
    assert "removed" in seen
    assert re.search(r"jpg: \w+ \(\d+ %\)", seen)


def test_what_the_pages_name_exists() -> None:
    own = TUTORIAL.split(OWN_MODEL)[1]
    for page in (own, README):
        for command in re.findall(r"^bshub (\w+)", page, re.MULTILINE):
            assert (ROOT / "cli" / f"{command}.py").is_file(), command
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page):
            assert any(option in text or option[2:].replace("-", "_") in text for text in SOURCES), option
        for target in re.findall(r"^make ([a-z-]+)", page, re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


SOURCES = [path.read_text(encoding="utf-8") for path in (ROOT / "cli").glob("*.py")]


def test_the_readme_fits_three_screens_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 150
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_the_recording_is_of_the_tutorial_and_names_no_place_of_its_machine() -> None:
    text = (ROOT / "docs" / "recording.txt").read_text(encoding="utf-8")
    for command in commands(TUTORIAL, install=True):
        for line in command.splitlines():
            assert line in text, f"make recording: {line} is not in it"
    assert not re.search(r"/root|/home/|/work/|://(?!huggingface\.co)|hf_\w{10}", text)
    assert "\x1b" not in text


@pytest.mark.skipif(sys.platform == "win32", reason="make")
def test_make_lists_its_targets() -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    done = subprocess.run(["make", "help"], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert {"setup", "demo", "test", "docs", "recording"} <= set(re.findall(r"make ([\w-]+)", done.stdout))
