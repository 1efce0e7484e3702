"""The single doors: the linter bans every other way in, and no pickle that is tried comes through."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from bshub.errors import CheckpointError
from bshub.intake import quarantine

# --- the linter

WAYS = {
    "torch.load": "import torch\ntorch.load('x')",
    "from torch import load": "from torch import load\nload('x')",
    "another name": "import torch as t\nt.load('x')",
    "torch.serialization": "from torch.serialization import load\nload('x')",
    "torch.jit.load": "import torch\ntorch.jit.load('x')",
    "torch.hub": "import torch\ntorch.hub.load('a', 'b')",
    "torch.package": "import torch.package\ntorch.package.PackageImporter('x')",
    "pickle": "import pickle\npickle.loads(b'')",
    "dill": "import dill\ndill.loads(b'')",
    "marshal": "import marshal\nmarshal.loads(b'')",
    "shelve": "import shelve\nshelve.open('x')",
    "numpy.load": "import numpy as np\nnp.load('x')",
    "Image.open": "from PIL import Image\nImage.open('x')",
    "PIL.Image": "import PIL.Image\nPIL.Image.open('x')",
    "socket": "import socket\nsocket.socket()",
    "urllib": "import urllib.request\nurllib.request.urlopen('x')",
    "requests": "import requests\nrequests.get('x')",
}
DOORS = {
    "bshub/intake/quarantine.py": "torch.load",
    "bshub/intake/images.py": "Image.open",
    "bshub/intake/weights_url.py": "urllib",
}


def bans(code: str, path: str) -> int:
    """How often the linter refuses code at a path, for a banned name."""
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "json"]
    linted = subprocess.run(
        [*command, "--stdin-filename", path, "-"], input=code, cwd=ROOT, capture_output=True, text=True
    )
    return len(json.loads(linted.stdout))


@pytest.mark.parametrize("way", WAYS)
def test_the_linter_bans_every_other_way_in(way: str) -> None:
    assert bans(WAYS[way], "bshub/intake/checkpoint.py")


def test_the_command_line_is_no_way_round() -> None:
    assert bans("\n".join(WAYS.values()), "cli/new.py") >= len(WAYS)


def test_the_doors_alone_are_let_through() -> None:
    assert all(bans(WAYS[way], path) == 0 for path, way in DOORS.items())
    with (ROOT / "pyproject.toml").open("rb") as stream:
        free = tomllib.load(stream)["tool"]["ruff"]["lint"]["per-file-ignores"]
    assert {path for path, rules in free.items() if "TID251" in rules} == {*DOORS, "tests/**", "examples/**"}


def test_where_the_ban_is_lifted_on_a_line_nothing_is_loaded() -> None:
    lifted = [
        line.strip()
        for folder in ("bshub", "cli")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "noqa" in line and ("TID251" in line or line.rstrip().endswith("noqa"))
    ]
    assert len(lifted) == 1 and "torch.hub.get_dir()" in lifted[0]


# --- pickles that run something, one for every instruction that can call


def text(value: str) -> bytes:
    """A pickled string, in an instruction that every protocol has."""
    return b"V" + value.encode("raw_unicode_escape") + b"\n"


def short(value: str) -> bytes:
    """A string of protocol 4."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


# Each calls open(marker, "w").
PAYLOADS: dict[str, Callable[[str], bytes]] = {
    "GLOBAL, REDUCE": lambda m: b"\x80\x02cbuiltins\nopen\n(" + text(m) + text("w") + b"tR.",
    "GLOBAL of another module": lambda m: b"\x80\x02cio\nopen\n(" + text(m) + text("w") + b"tR.",
    "a dotted name": lambda m: b"\x80\x04" + short("pathlib") + short("Path.touch") + b"\x93("
    + b"\x80\x04" + short("pathlib") + short("Path") + b"\x93(" + short(m) + b"tRtR.",
    "INST": lambda m: b"(" + text(m) + text("w") + b"ibuiltins\nopen\n.",
    "OBJ": lambda m: b"(cio\nFileIO\n" + text(m) + text("w") + b"o.",
    "NEWOBJ, BUILD": lambda m: b"\x80\x02clogging\nFileHandler\n(t\x81}" + b"(" + text("baseFilename") + text(m) + b"ub"
    + b"0cbuiltins\nopen\n(" + text(m) + text("w") + b"tR.",
    "STACK_GLOBAL": lambda m: b"\x80\x04" + short("builtins") + short("open") + b"\x93(" + short(m) + short("w")
    + b"tR.",
    "exec": lambda m: b"\x80\x02cbuiltins\nexec\n(" + text(f"open({m!r}, 'w')") + b"tR.",
    "eval": lambda m: b"\x80\x02cbuiltins\neval\n(" + text(f"open({m!r}, 'w')") + b"tR.",
    "getattr": lambda m: b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + text("os") + b"tR"
    + text("mknod") + b"tR(" + text(m) + b"tR.",
    "a shell": lambda m: b"\x80\x02cposix\nsystem\n(" + text(f": > '{m}'") + b"tR.",
    "a program": lambda m: b"\x80\x02csubprocess\ncall\n((" + text("touch") + text(m) + b"ltR.",
    "a value of a state dict": lambda m: b"\x80\x02}" + text("w") + b"cbuiltins\nopen\n(" + text(m)
    + text("w") + b"tRs.",
}  # fmt: skip


def zipped(data: bytes) -> bytes:
    """The pickle in the archive that ``torch.save`` writes."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/byteorder", b"little")
        archive.writestr("m/version", b"3\n")
    return buffer.getvalue()


def legacy(place: int) -> Callable[[bytes], bytes]:
    """The pickle at one of the five places of the old format: magic, protocol, machine, object, keys of storages."""

    def build(data: bytes) -> bytes:
        parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"w": 1}, []]
        return b"".join(data if k == place else pickle.dumps(part, 2) for k, part in enumerate(parts))

    return build


SHELLS = {"bare": bytes, "zip": zipped, **{f"old format, place {k}": legacy(k) for k in range(5)}}


def test_the_payloads_are_live(tmp_path: Path) -> None:
    """In a process of its own each would have done its work: what follows shows something."""
    for number, payload in enumerate(PAYLOADS.values()):
        (tmp_path / f"{number}.pkl").write_bytes(payload(str(tmp_path / f"{number}.ran")))
        pickletools.dis(payload("x"), io.StringIO())
    code = "import pathlib, pickle, sys\nfor p in pathlib.Path(sys.argv[1]).glob('*.pkl'): pickle.loads(p.read_bytes())"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert {path.stem for path in tmp_path.glob("*.ran")} == {str(number) for number in range(len(PAYLOADS))}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: str, shell: str) -> None:
    """The child's own reader, without the walls that would stop a payload that ran."""
    for wall in ("limit_process", "forbid_natively", "forbid_python"):
        monkeypatch.setattr(quarantine, wall, lambda *arguments: None)
    marker, file = tmp_path / "ran", tmp_path / "m.pth"
    file.write_bytes(SHELLS[shell](PAYLOADS[payload](str(marker))))
    with pytest.raises(CheckpointError) as caught:
        quarantine.convert(file, tmp_path / "m.safetensors")
    assert not marker.exists()
    assert not (tmp_path / "m.safetensors").exists()
    assert caught.value.hint and "weights_only" not in str(caught.value)


CHILD = """
import pickle, sys
import torch
from bshub.intake import quarantine

def unguarded(handle, **options):
    return pickle.load(handle)

torch.load = unguarded  # as if the guard had another hole
sys.exit(quarantine.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's walls are Linux's")
@pytest.mark.parametrize("payload", ["GLOBAL, REDUCE", "a shell", "a program", "getattr"])
def test_behind_a_hole_in_the_guard_the_walls_stand(
    tmp_path: Path, child_environment: dict[str, str], payload: str
) -> None:
    """With the guard off the payload runs, in a process that can write nowhere and start nothing."""
    marker, file, inside = tmp_path / "ran", tmp_path / "m.pkl", tmp_path / "inside"
    inside.mkdir()
    file.write_bytes(PAYLOADS[payload](str(marker)))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(file), str(inside / "m.safetensors")],
        env=child_environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 2, child.stderr
    assert json.loads(child.stdout)["message"].startswith("m.pkl: ")
    assert not marker.exists()
    assert list(inside.iterdir()) == []


def test_a_sound_file_of_the_same_making_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shells are not refused for their own sake."""
    for wall in ("limit_process", "forbid_natively", "forbid_python"):
        monkeypatch.setattr(quarantine, wall, lambda *arguments: None)
    torch.save({"w": torch.ones(2)}, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        for name in ("data.pkl", "byteorder", "data/0", "version"):
            archive.writestr(f"m/{name}", records[name])
    quarantine.convert(tmp_path / "m.pth", tmp_path / "m.safetensors")
    length = struct.unpack("<Q", (tmp_path / "m.safetensors").read_bytes()[:8])[0]
    assert length < 200
