"""The child process that opens pickles: ``python -m bshub.intake.quarantine IN OUT``.

Under limits of memory, processor time and file size, without network, other programs or a place to write but OUT's
folder (``confine.py``), it reads IN with ``weights_only=True``, admits the tensors and writes them to OUT as
safetensors. On refusal it prints one line of JSON, ``{"message": …, "hint": …}``, and ends
with status 2. torch's own messages are not passed on: they advise turning the guard off.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import NoReturn

from bshub.errors import BshubError, CheckpointError, printable
from bshub.intake.confine import forbid_natively, forbid_python
from bshub.intake.header import MAX_BYTES

MAX_ENTRIES = 200_000
CPU_SECONDS = 100

_RESAVE = "ask its author for safetensors, or where it was trained: torch.save(model.state_dict(), 'weights.pth')"
_AGAIN = "fetch it again"


def main(arguments: list[str]) -> int:
    """Convert one file; see the module.

    Args:
        arguments: IN and OUT.

    Returns:
        The exit status.
    """
    source, target = (Path(argument) for argument in arguments)
    origin = printable(source.name, 120)
    refusal: BshubError
    try:
        convert(source, target)
        return 0
    except BshubError as error:
        refusal = error
    except MemoryError:
        refusal = CheckpointError(f"{origin}: wants more memory than its size explains", hint=_RESAVE)
    except Exception as error:
        refusal = CheckpointError(f"{origin}: conversion failed ({type(error).__name__})", hint=_RESAVE)
    print(json.dumps({"message": refusal.message, "hint": refusal.hint or _RESAVE}))
    return 2


def convert(source: Path, target: Path) -> None:
    """Read a torch checkpoint and write its tensors as safetensors.

    Args:
        source: What ``torch.save`` wrote, in either of its formats.
        target: The safetensors file to write.

    Raises:
        CheckpointError: The file is damaged, asks for anything but tensors, or holds tensors that are not admitted.
    """
    origin = printable(source.name, 120)
    limit_process(2 << 30)
    with source.open("rb") as handle:
        zipped = handle.read(4) == b"PK\x03\x04"  # as torch decides
    unpacked = inspect_archive(source, origin) if zipped else source.stat().st_size
    # Imported only now: most refusals end above, and torch's own mappings must not count against the limit.
    limit_process(None)
    import safetensors.torch

    from bshub.intake.admission import admit, unwrap

    limit_process(6 * unpacked + (1 << 30))
    forbid_natively(target.parent)
    forbid_python(target.parent)
    state = admit(unwrap(_load(source, origin), origin=origin), origin=origin)
    safetensors.torch.save_file(state, target)


def inspect_archive(source: Path, origin: str) -> int:
    """Check a zip checkpoint's directory and checksums without unpickling anything.

    Args:
        source: The file.
        origin: Its name, for messages.

    Returns:
        The bytes that its records unpack to.

    Raises:
        CheckpointError: It is damaged, a decompression bomb, TorchScript, or a zip of something else.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            unpacked = sum(entry.file_size for entry in entries)
            size = source.stat().st_size
            if len(entries) > MAX_ENTRIES or unpacked > min(MAX_BYTES, 10 * size + (64 << 20)):
                _refuse(origin, f"{size} bytes of zip unpack to {unpacked}, in {len(entries)} records", _RESAVE)
            if any(name.endswith("/constants.pkl") for name in names):
                _refuse(origin, "a TorchScript archive, which is a program", _RESAVE)
            if not any(name.endswith("/data.pkl") for name in names):
                _refuse(origin, "a zip archive, and not one that torch.save wrote", _RESAVE)
            # torch.save writes zeros for all of them when it is told to save the time.
            if any(entry.CRC for entry in entries) and (damaged := archive.testzip()) is not None:
                _refuse(origin, f"damaged: the checksum of {printable(damaged, 80)} is wrong", _AGAIN)
            return unpacked
    except (BshubError, MemoryError):
        raise
    except Exception:  # zipfile's parser answers hostile bytes with a dozen exception types
        _refuse(origin, "a truncated or damaged zip archive", _AGAIN)


def limit_process(memory: int | None, seconds: int = CPU_SECONDS) -> None:
    """Bound this process; does nothing where the system has no such limits.

    Args:
        memory: Bytes that it may map on top of what it has now; None lifts the limit on memory.
        seconds: Of processor time.
    """
    if sys.platform == "win32":
        return
    import resource

    def bound(which: int, value: int) -> None:
        hard = resource.getrlimit(which)[1]
        # A limit below what is in use, as macOS answers, must not end the conversion.
        try:
            resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
        except (ValueError, OSError):
            return

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        mapped = pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        mapped = 8 << 30
    bound(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)[1] if memory is None else mapped + memory)
    bound(resource.RLIMIT_CPU, seconds)
    bound(resource.RLIMIT_FSIZE, MAX_BYTES + (64 << 20))
    bound(resource.RLIMIT_CORE, 0)


def _load(source: Path, origin: str) -> object:
    import torch

    try:
        # An open file: by its path, torch would follow the extension .safetensors.
        with source.open("rb") as handle:
            return torch.load(handle, map_location="cpu", weights_only=True)
    except Exception as error:
        text = str(error)
        if isinstance(error, MemoryError) or "allocate memory" in text:
            raise MemoryError from None
        if "Unsupported operand" in text:
            _refuse(origin, "its pickle uses an instruction outside protocol 2, which weights never need", _RESAVE)
        _explain(_unsafe_globals(source, text), origin)


def _unsafe_globals(source: Path, text: str) -> list[str]:
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        with source.open("rb") as handle:
            return sorted(get_unsafe_globals_in_checkpoint(handle))
    except Exception:  # it reads zip files of protocol 2 only
        found = re.search(r"GLOBAL ([\w.]+)", text)
        return [found[1]] if found else []


def _explain(names: list[str], origin: str) -> NoReturn:
    if not names:
        _refuse(origin, "not plain tensors as torch.save writes them, or damaged", _RESAVE)
    quoted = ", ".join(printable(name, 80) for name in names[:3]) + (", …" if len(names) > 3 else "")
    if any(name.startswith("torch.nn.modules.") for name in names):
        _refuse(origin, f"a whole pickled model, not its weights (its pickle asks for {quoted})", _RESAVE)
    _refuse(origin, f"its pickle asks for {quoted}, which weights never need; nothing was run", _RESAVE)


def _refuse(origin: str, what: str, hint: str) -> NoReturn:
    raise CheckpointError(f"{origin}: {what}", hint=hint)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
