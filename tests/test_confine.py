"""What the child that opens pickles gives up: tried in a real process, and the kernel's filter call by call."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bshub.intake import confine
from bshub.intake.confine import filter_program, forbid_natively, forbid_python

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's walls are Linux's")

ATTEMPTS = {
    "socket": "import socket; socket.socket()",
    "connect": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "program": "import subprocess; subprocess.run(['true'])",
    "shell": "import os; os.system('touch {outside}')",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "write": "open({outside!r}, 'w')",
    "append": "open({existing!r}, 'a')",
    "remove": "import os; os.remove({existing!r})",
    "rename": "import os; os.rename({existing!r}, {outside!r})",
    "link": "import os; os.symlink('/', {outside!r})",
    "through a link": "open({link!r} + '/x', 'w')",
}
ALLOWED = {
    "write inside": "open({inside!r}, 'w').write('x')",
    "read": "assert open({existing!r}).read() == 'mine'",
    "import": "import xml.dom.minidom",
}


def attempt(tmp_path: Path, wall: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has put up one wall around ``tmp_path/in``."""
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "existing").write_text("mine")
    (folder / "link").symlink_to(tmp_path)
    names = {
        "outside": tmp_path / "out",
        "inside": folder / "x",
        "existing": tmp_path / "existing",
        "link": folder / "link",
    }
    line = code.format(**{name: str(path) for name, path in names.items()})
    text = (
        "import os, sys\nfrom pathlib import Path\nfrom bshub.intake.confine import *\n"
        f"walls = {wall}(Path({str(folder)!r}))\n"
        "if walls == (): sys.exit('no such kernel')\n"
        f"try:\n    {line}\nexcept PermissionError as error:\n    print('refused:', error)\nelse:\n    print('done')\n"
    )
    return subprocess.run([sys.executable, "-B", "-c", text], capture_output=True, text=True, timeout=60, cwd="/")


@pytest.mark.parametrize("wall", ["forbid_python", pytest.param("forbid_natively", marks=linux)])
@pytest.mark.parametrize("what", ATTEMPTS)
def test_what_is_forbidden_does_not_happen(tmp_path: Path, wall: str, what: str) -> None:
    child = attempt(tmp_path, wall, ATTEMPTS[what])
    if "no such kernel" in child.stderr:
        pytest.skip("this kernel has neither Landlock nor seccomp")
    # os.system reports a shell that could not be started by its status, without an exception
    assert child.stdout.startswith("refused:") or (what == "shell" and wall == "forbid_natively"), child.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "existing").read_text() == "mine"


@pytest.mark.parametrize("wall", ["forbid_python", pytest.param("forbid_natively", marks=linux)])
@pytest.mark.parametrize("what", ALLOWED)
def test_what_a_conversion_needs_still_works(tmp_path: Path, wall: str, what: str) -> None:
    child = attempt(tmp_path, wall, ALLOWED[what])
    if "no such kernel" in child.stderr:
        pytest.skip("this kernel has neither Landlock nor seccomp")
    assert child.stdout == "done\n", child.stdout + child.stderr


def answer(program: bytes, architecture: int, number: int) -> int:
    """Run a filter as the kernel would: classic BPF over ``struct seccomp_data``."""
    data = struct.pack("<iI", number - (1 << 32) if number >= 1 << 31 else number, architecture)
    steps = [struct.unpack_from("<HBBI", program, 8 * k) for k in range(len(program) // 8)]
    place = value = 0
    for _ in range(len(steps)):
        code, yes, no, operand = steps[place]
        place += 1
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
        elif code == 0x15:
            place += yes if value == operand else no
        elif code == 0x35:
            place += yes if value >= operand else no
        else:
            assert code == 0x06
            return operand
    raise AssertionError("the filter does not end")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@given(number=st.integers(0, 600) | st.integers(0, 2**32 - 1))
def test_the_filter_refuses_its_calls_and_no_other(machine: str, number: int) -> None:
    architecture, _, calls = confine._CALLS[machine]
    program = filter_program(machine)
    wanted = 0x00050001 if number in calls or number >= 0x40000000 else 0x7FFF0000
    assert answer(program, architecture, number) == wanted
    assert answer(program, architecture ^ 1, number) == 0x80000000
    for call in calls:
        assert answer(program, architecture, call) == 0x00050001


@linux
def test_the_numbers_are_the_kernels(tmp_path: Path) -> None:
    """Python's own names for a few calls, against the C library that was compiled for this machine."""
    import ctypes
    import os
    import platform

    if platform.machine() not in confine._CALLS:
        pytest.skip("no filter for this machine")
    library = ctypes.CDLL(None, use_errno=True)
    calls = confine._CALLS[platform.machine()][2]
    handle = library.syscall(calls[0], 1, 1, 0)  # socket(AF_UNIX, SOCK_STREAM)
    assert os.readlink(f"/proc/self/fd/{handle}").startswith("socket:")
    os.close(handle)
    pair = (ctypes.c_int * 2)()
    assert library.syscall(calls[1], 1, 1, 0, pair) == 0  # socketpair
    for end in pair:
        os.close(end)
    assert library.syscall(calls[10], b"/nowhere", None, None) == -1  # execve
    assert ctypes.get_errno() == 2


Syscall = Callable[..., int]


def kernel(landlock: int, *, fails: int | None = None) -> tuple[Syscall, list[tuple[Any, ...]]]:
    """A kernel that knows so much of Landlock, where the n-th call fails; and what it was asked."""
    asked: list[tuple[Any, ...]] = []

    def syscall(number: int, *arguments: Any) -> int:
        asked.append((number, *arguments))
        if number == 444 and arguments[-1] == 1:
            return landlock
        if fails == number:
            return -1
        return _spare() if number == 444 else 0

    return syscall, asked


def _spare() -> int:
    import os

    return os.open(os.devnull, os.O_RDONLY)


@linux
@pytest.mark.parametrize(
    ("landlock", "fails", "walls"),
    [
        (-1, None, ("seccomp",)),
        (1, None, ("landlock", "seccomp")),
        (3, None, ("landlock", "seccomp")),
        (3, 444, ("seccomp",)),
        (3, 445, ("seccomp",)),
        (3, 446, ("seccomp",)),
        (3, 317, ("landlock",)),
    ],
)
def test_each_wall_stands_without_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, landlock: int, fails: int | None, walls: tuple[str, ...]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    syscall, asked = kernel(landlock, fails=fails)
    assert forbid_natively(tmp_path, lambda *arguments: 0, syscall) == walls
    handled = [struct.unpack("<Q", call[1])[0] for call in asked if call[0] == 444 and call[1]]
    assert all((mask >> 14 & 1) == (landlock >= 3) for mask in handled)  # truncation is known from version 3 on
    assert all(mask >> 1 & 1 and not mask >> 2 & 3 for mask in handled)  # writing is handled, reading is not


@linux
def test_without_the_promise_or_the_machine_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syscall, asked = kernel(3)
    assert forbid_natively(tmp_path, lambda *arguments: -1, syscall) == ()
    assert asked == []
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert forbid_natively(tmp_path, lambda *arguments: 0, syscall) == ("landlock",)
    monkeypatch.setattr("sys.platform", "darwin")
    assert forbid_natively(tmp_path, lambda *arguments: 0, syscall) == ()


def test_the_python_wall_sees_what_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook itself, which no process can take off again."""
    hooks: list[Callable[[str, tuple[Any, ...]], None]] = []
    monkeypatch.setattr("sys.addaudithook", hooks.append)
    forbid_python(tmp_path)
    (hook,) = hooks
    for event, arguments in (
        ("socket.connect", ()), ("os.system", ("true",)), ("subprocess.Popen", ()), ("ctypes.dlopen", ("x",)),
        ("open", (str(tmp_path.parent / "x"), "w", 0o1101)), ("open", (b"/x", None, 1)),
    ):  # fmt: skip
        with pytest.raises(PermissionError):
            hook(event, arguments)
    for event, arguments in (
        ("open", (str(tmp_path / "x"), "w", 0o1101)), ("open", (str(tmp_path.parent / "x"), "r", 0)),
        ("open", (3, "w", 1)), ("import", ("os",)), ("compile", ()),
    ):  # fmt: skip
        hook(event, arguments)
