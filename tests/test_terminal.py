"""What a stranger meets in a terminal: suggestions for typos, 80 columns, colours, completion, other systems."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import DEMO, ROOT, bshub_command

from bshub_cli._output import Bars, print_table, say
from bshub_cli.main import app

RUN = [sys.executable, "-c", "from bshub_cli.main import app; app(prog_name='bshub')"]
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
CLEAN = ("--clean-dir", str(DEMO / "clean"))
BASE = "timm/resnet18?num_classes=10"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("scan", "resnt18"), "timm/resnet18"),
        (("scan", "ResNet-18"), "timm/resnet18"),
        (("scan", "timm/resnt18"), "timm/resnet18"),
        (("scan", "torchvision/resnt18"), "torchvision/resnet18"),
        (("scan", "tim/resnet18"), "timm/resnet18"),
        (("scan", "torchvison/resnet18"), "torchvision/resnet18"),
        (("scan", DEMO / "modle"), "model"),
        (("scan", DEMO / "model", "--score", "lipshitz"), "lipschitz"),
        (("scan", DEMO / "model", "--score", "Dormant"), "dormant"),
        (("sanitize", DEMO / "model", *CLEAN, "--method", "fine_pruning"), "fine-pruning"),
        (("sanitize", DEMO / "model", *CLEAN, "--repair", "finetun", "--dry-run"), "finetune"),
        (("attack", BASE, "--data", DEMO, "-o", "out", "--attack", "badnet"), "badnets"),
        (("attack", BASE, "--data", DEMO, "-o", "out", "--attack", "input_aware"), "input-aware"),
        (("bench", DEMO, "--data", DEMO, "-o", "out", "--methods", "bshub papr"), "paper"),
        (("sanitise", DEMO / "model"), "sanitize"),
        (("sanitize", DEMO / "model", "--clean-dri", "x"), "--clean-dir"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1] if isinstance(value, tuple) else None,
)
def test_a_typo_is_answered_with_what_was_meant(
    typed: tuple[object, ...], meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = bshub_command(*typed)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.search(rf"(?i)did you mean '?[\w/.-]*{re.escape(meant)}|possible options: {meant}", result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_repository_that_looks_like_a_typo_can_still_be_named() -> None:
    from bshub.intake.reference import parse_reference

    assert parse_reference("hf-hub:tim/resnet18").repository == "tim/resnet18"
    assert parse_reference("tim/my-own-network-of-2024").repository == "tim/my-own-network-of-2024"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_fits_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    result = bshub_command(command, "--help")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_table_fits_80_columns_whatever_stands_in_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    long = "features.denseblock4.denselayer32.norm2." * 4
    print_table("t", ["layer", "count", "filters"], [[long, "1", ", ".join(["1024"] * 40)], ["x\x1b[31m", "", ""]])
    say(" ".join(["word"] * 60))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    for part in ("layer", "1024", "denselayer32"):
        assert part in out


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("colours", [True, False])
def test_no_color_is_honoured_on_a_terminal(colours: bool, tmp_path: Path) -> None:
    import pty

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    environment.pop("NO_COLOR", None)
    code = (
        "from bshub_cli._output import Bars, print_table\n"
        "with Bars(False).step('repair', 3) as advance:\n    [advance(1) for _ in range(3)]\n"
        "print_table('t', ['a'], [['1']])"
    )
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment | ({} if colours else {"NO_COLOR": "1"}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            said += chunk
    except OSError:  # the other end has gone
        pass
    os.close(ours)
    assert child.wait() == 0, said
    assert "3/3" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert bool(re.search(rb"\x1b\[[0-9;]*(3[0-8]|4[0-8]|9[0-7])[0-9;]*m", said)) == colours


def test_a_step_without_a_total_counts_what_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Bars(False).step("anp", None) as advance:
        for _ in range(1234):
            advance(1)
    assert "anp 1,234" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_installs_and_completes(shell: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "SHELL": f"/bin/{shell}", "USERPROFILE": str(tmp_path)}
    # the shell is the one that is asked for, not the one around the tests, which need not have one
    environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    run = {"env": environment, "capture_output": True, "text": True, "timeout": 120}
    shown = subprocess.run([*RUN, "--show-completion", shell], **run)  # type: ignore[call-overload]
    assert shown.returncode == 0, shown.stderr
    assert "bshub" in shown.stdout
    done = subprocess.run([*RUN, "--install-completion", shell], **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert any("bshub" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    asked = {"_BSHUB_COMPLETE": f"complete_{shell}", "COMP_WORDS": "bshub sani", "COMP_CWORD": "1"}
    asked |= {"_TYPER_COMPLETE_ARGS": "bshub sani", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    words = subprocess.run(RUN, **{**run, "env": environment | asked})  # type: ignore[call-overload]
    assert "sanitize" in words.stdout


ONE_SYSTEM = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "posix", "msvcrt", "winreg", "_winapi"}
FORK_ONLY = {"fork", "forkpty", "setsid", "killpg", "getuid", "SIGKILL", "SIGALRM", "setitimer", "alarm", "uname"}


def test_no_module_needs_one_system_to_be_imported_and_nothing_forks() -> None:
    for path in [*(ROOT / "bshub").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            assert not names & ONE_SYSTEM, f"{path.name} imports {names & ONE_SYSTEM} on every system"
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & FORK_ONLY, f"{path.name} uses {used & FORK_ONLY}"


def test_every_module_is_imported_where_the_modules_of_one_system_are_absent(child_environment: dict[str, str]) -> None:
    code = (
        "import sys, pkgutil, importlib\n"
        f"absent = {sorted(ONE_SYSTEM - {'posix', 'msvcrt', 'winreg', '_winapi'})}\n"
        "import torch, timm, torchvision, onnx, altair, huggingface_hub, subprocess, jinja2, vl_convert, onnxruntime\n"
        "for name in absent: sys.modules[name] = None\n"
        "import bshub, bshub_cli\n"
        "for package in (bshub, bshub_cli):\n"
        "    for it in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(it.name)\n"
    )
    child = subprocess.run([sys.executable, "-c", code], env=child_environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_a_result_folder_is_named_safely_whatever_separators_the_reference_has() -> None:
    from bshub_cli.sanitize import _name

    assert _name("C:\\models\\r18.pth") == "r18.pth"
    assert _name("timm/resnet18?num_classes=10") == "resnet18"
    assert _name("..") == "model"
