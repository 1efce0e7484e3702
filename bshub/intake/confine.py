"""What a process gives up before it opens a foreign pickle: the network, other programs, writing elsewhere.

Three walls behind ``weights_only``. An audit hook, on every system, stops what Python code could do. On Linux the
kernel stops native code as well: seccomp refuses the system calls that open sockets and start programs, Landlock
refuses to write, make or delete anything outside one folder. Where the kernel lacks one of them the others stand.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NO_NEW_PRIVS = 38  # of prctl
_SET_FILTER, _ALL_THREADS = 1, 1  # of seccomp
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000 | 1, 0x7FFF0000  # seccomp's answers; 1 is EPERM
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF
_X32 = 0x40000000  # the same calls under a second set of numbers

# machine → its audit architecture, the number of seccomp, and those of: socket, socketpair, connect, bind, listen,
# accept, accept4, sendto, sendmsg, sendmmsg, execve, execveat, ptrace, process_vm_writev, bpf, io_uring_setup; then
# fork and vfork, which aarch64 does not have
_CALLS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "x86_64": (0xC000003E, 317, (41, 53, 42, 49, 50, 43, 288, 44, 46, 307, 59, 322, 101, 311, 321, 425, 57, 58)),
    "aarch64": (0xC00000B7, 277, (198, 199, 203, 200, 201, 202, 242, 206, 211, 269, 221, 281, 117, 271, 280, 425)),
}

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # Landlock's calls, the same on every machine
_EXECUTE, _WRITE, _TRUNCATE = 1 << 0, 1 << 1, 1 << 14
_CHANGE = sum(1 << bit for bit in range(4, 13))  # delete and make: files, folders, links, devices, pipes, sockets

_FORBIDDEN = frozenset(
    {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.startfile", "os.startfile/2", "pty.spawn"}
    | {"subprocess.Popen", "ctypes.dlopen", "ctypes.dlsym", "ctypes.call_function", "webbrowser.open"}
    | {"os.kill", "os.putenv", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.chown"}
)

System = Callable[..., int]


def forbid_python(folder: Path) -> None:
    """Stop Python code from using the network, starting programs, and writing outside a folder; for good.

    Args:
        folder: The only place where files may be opened for writing.
    """
    inside = os.path.realpath(folder) + os.sep

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN or event.startswith("socket."):
            raise PermissionError(f"a checkpoint tried {event}")
        if (
            event == "open"
            and _writes(*arguments)
            and not os.path.realpath(os.fsdecode(arguments[0])).startswith(inside)
        ):
            raise PermissionError("a checkpoint tried to write a file")

    sys.addaudithook(hook)


def _writes(path: Any, mode: str | None, flags: int) -> bool:
    return isinstance(path, (str, bytes)) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def forbid_natively(folder: Path, prctl: System | None = None, syscall: System | None = None) -> tuple[str, ...]:
    """Let the kernel refuse sockets, programs, and changes outside a folder; for good.

    Landlock binds this thread and those that it starts, so it is called while there is no other.

    Args:
        folder: The only place where files may be written, made or deleted.
        prctl: The C function; looked up by default.
        syscall: The C function; looked up by default.

    Returns:
        What holds from now on: ``landlock``, ``seccomp``, both or neither.
    """
    if sys.platform != "linux":
        return ()
    try:
        library = ctypes.CDLL(None)
        prctl, syscall = prctl or library.prctl, syscall or library.syscall
    except (OSError, AttributeError):
        return ()
    if prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return ()
    walls = {"landlock": _landlock(folder, syscall), "seccomp": _seccomp(syscall)}
    return tuple(name for name, stands in walls.items() if stands)


def _landlock(folder: Path, syscall: System) -> bool:
    version = syscall(_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = _EXECUTE | _WRITE | _CHANGE | (_TRUNCATE if version >= 3 else 0)
    rules = syscall(_CREATE, struct.pack("<Q", handled), ctypes.c_size_t(8), 0)
    if rules < 0:
        return False
    place = os.open(folder, os.O_RDONLY)
    try:
        allowed = struct.pack("<Qi", handled & ~_EXECUTE, place)
        return syscall(_ADD, rules, 1, allowed, 0) == 0 and syscall(_RESTRICT, rules, 0) == 0
    finally:
        os.close(place)
        os.close(rules)


def _seccomp(syscall: System) -> bool:
    machine = platform.machine()
    if machine not in _CALLS or sys.maxsize < 2**32:
        return False
    program = filter_program(machine)
    text = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(text))
    return syscall(_CALLS[machine][1], _SET_FILTER, _ALL_THREADS, header) == 0


def filter_program(machine: str) -> bytes:
    """The seccomp filter of a machine, as classic BPF: eight bytes an instruction.

    Args:
        machine: ``x86_64`` or ``aarch64``.
    """
    architecture, _, calls = _CALLS[machine]
    count = len(calls)
    # code, steps to skip if true, steps to skip if false, operand
    program = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the call's number
        (_AT_LEAST, count + 1, 0, _X32),
        *((_EQUAL, count - place, 0, number) for place, number in enumerate(calls)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return b"".join(struct.pack("<HBBI", *step) for step in program)
