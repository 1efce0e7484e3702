"""The one door for checkpoint bytes: a file on disk → an admitted ``dict[str, Tensor]``.

The content decides, never the extension. safetensors is read here, after its header has been checked. Everything
that needs unpickling is converted by a child process under limits (``quarantine.py``); only the safetensors file
that it writes is read here, and it is admitted like any other. No pickle is opened in this process.
"""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Literal, NoReturn

import safetensors.torch
from torch import Tensor

from bshub.errors import CheckpointError, printable
from bshub.intake.admission import admit, unwrap
from bshub.intake.child import refusal, run_child
from bshub.intake.header import MAX_BYTES, check_header
from bshub.intake.loading import load_into

__all__ = ["admit", "load_into", "read_checkpoint", "unwrap"]

SECONDS = 120

# offset, magic, what it is, what to do
_FOREIGN: tuple[tuple[int, bytes, str, str], ...] = (
    (257, b"ustar", "a tar archive", "unpack it, or load it with the torch that wrote it and save the state dict"),
    (0, b"\x1f\x8b", "gzip-compressed", "unpack it first"),
    (0, b"\x89HDF", "an HDF5 (Keras) file", "bshub reads PyTorch checkpoints: safetensors or .pth"),
    (0, b"\x93NUMPY", "a NumPy array", "bshub reads PyTorch checkpoints: safetensors or .pth"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the weights", "fetch the weights: git lfs pull"),
)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint of unknown origin.

    Args:
        path: A safetensors file, or what ``torch.save`` wrote, under any extension.

    Returns:
        Tensor name → contiguous CPU tensor that owns its memory: strided, finite, float or integer.

    Raises:
        CheckpointError: The file cannot be read, or holds anything else than plain tensors.
    """
    origin = printable(path.name, 120)
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise CheckpointError(f"{origin}: not a regular file", hint="give the checkpoint file itself")
        if state.st_size > MAX_BYTES:
            raise CheckpointError(
                f"{origin}: {state.st_size} bytes, more than the {MAX_BYTES} that are read",
                hint="save the state dict alone, without optimizer state",
            )
        with path.open("rb") as handle:
            kind = sniff(handle.read(512), origin)
            if kind == "safetensors":
                handle.seek(0)
                return _from_safetensors(handle.read(MAX_BYTES + 1), origin)
        return _from_pickle(path, origin)
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise CheckpointError(f"{origin}: cannot be read: {reason}", hint="check the path and its rights") from error
    except MemoryError:
        raise CheckpointError(f"{origin}: too large for this machine's memory", hint="use a larger machine") from None


def sniff(head: bytes, origin: str) -> Literal["safetensors", "pickle"]:
    """Tell from a file's first 512 bytes how it must be read.

    Args:
        head: The first bytes.
        origin: The file's name, for messages.

    Raises:
        CheckpointError: No checkpoint begins like this.
    """
    if not head:
        raise CheckpointError(f"{origin}: the file is empty", hint="fetch it again")
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "pickle"
    for offset, magic, what, hint in _FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            raise CheckpointError(f"{origin}: {what}", hint=hint)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{origin}: a web page, not a checkpoint", hint="the download failed: fetch the file itself, signed in"
        )
    raise CheckpointError(
        f"{origin}: neither safetensors nor written by torch.save (begins with {head[:8].hex()})",
        hint="fetch it again, or save the state dict as safetensors",
    )


def _from_safetensors(data: bytes, origin: str) -> dict[str, Tensor]:
    names = check_header(data, origin)
    try:
        state = safetensors.torch.load(data)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        raise CheckpointError(
            f"{origin}: the safetensors library refused it: {printable(error, 120)}", hint="fetch it again"
        ) from None
    if state.keys() != names:
        raise CheckpointError(f"{origin}: its header can be read in two ways", hint="fetch it again")
    return admit(state, origin=origin)


def _from_pickle(path: Path, origin: str) -> dict[str, Tensor]:
    # Windows cannot delete what a killed child may still hold open
    with tempfile.TemporaryDirectory(prefix="bshub-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        converted = folder / "converted.safetensors"
        try:
            code, verdict = run_child(
                "bshub.intake.quarantine", [os.path.abspath(path), str(converted)], folder, SECONDS
            )
        except OSError as error:
            raise CheckpointError(
                f"{origin}: no process to open its pickle in: {error.strerror}", hint="give it as safetensors"
            ) from error
        except subprocess.TimeoutExpired:
            raise CheckpointError(
                f"{origin}: conversion stopped after {SECONDS} s", hint="give it as safetensors"
            ) from None
        if code != 0:
            _refuse(verdict, code, origin)
        return _from_safetensors(_read_converted(converted, origin), origin)


def _read_converted(path: Path, origin: str) -> bytes:
    # The child may have been taken over: it must not point us at another file, or at a pipe that never ends.
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > 2 * MAX_BYTES:
            raise CheckpointError(f"{origin}: conversion gave no usable file", hint="give it as safetensors")
        return path.read_bytes()
    except OSError:
        raise CheckpointError(f"{origin}: conversion left no file", hint="give it as safetensors") from None


def _refuse(verdict: bytes, code: int, origin: str) -> NoReturn:
    told = refusal(verdict)
    # A negative code is a signal: the processor limit, a crash of the reader, or no memory left.
    why = f"stopped by signal {-code}" if code < 0 else f"failed with status {code}"
    message, hint = told or (f"{origin}: conversion {why}", "fetch it again, or give it as safetensors")
    raise CheckpointError(message, hint=hint)
