"""The child's own code in this process, where its lines can be counted; its walls are tried in ``test_confine``."""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bshub.errors import BshubError, CheckpointError
from bshub.intake import checkpoint, quarantine


@pytest.fixture(autouse=True)
def no_walls(monkeypatch: pytest.MonkeyPatch) -> None:
    for wall in ("limit_process", "forbid_natively", "forbid_python"):
        monkeypatch.setattr(quarantine, wall, lambda *arguments: None)


def verdict(folder: Path, value: object, capsys: pytest.CaptureFixture[str], **how: Any) -> tuple[int, dict[str, str]]:
    """What the child would print and end with."""
    torch.save(value, folder / "m.pth", **how)
    status = quarantine.main([str(folder / "m.pth"), str(folder / "m.safetensors")])
    printed = capsys.readouterr().out
    return status, json.loads(printed) if printed else {}


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_weights_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str], zipped: bool) -> None:
    state = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    answer = verdict(tmp_path, {"epoch": 1, "state_dict": state}, capsys, _use_new_zipfile_serialization=zipped)
    assert answer == (0, {})
    read = load_file(tmp_path / "m.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": argparse.Namespace()}, "argparse.Namespace, which weights never need; nothing was run"),
        (torch.nn.Linear(1, 1), "a whole pickled model"),
        ({"w": torch.ones(1).expand(10**12)}, "claims 4000000000000 bytes"),
        ([1], "holds a list"),
        ({"w": torch.tensor(float("nan"))}, "NaN or Inf"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_refusal_is_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: object, said: str, zipped: bool
) -> None:
    status, told = verdict(tmp_path, value, capsys, _use_new_zipfile_serialization=zipped)
    assert status == 2
    assert said in told["message"]
    assert told["hint"]


@pytest.mark.parametrize("error", [MemoryError, RuntimeError("can't allocate memory"), OSError, RecursionError])
def test_whatever_happens_ends_in_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def fails(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("torch.load", fails)
    status, told = verdict(tmp_path, {"w": torch.ones(1)}, capsys)
    assert status == 2
    assert told["message"].startswith("m.pth: ")
    assert ("more memory" in told["message"]) == (error is MemoryError or "memory" in str(error))


def test_a_converter_that_breaks_is_told_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **more: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    assert verdict(tmp_path, {"w": torch.ones(1)}, capsys)[1]["message"] == "m.pth: conversion failed (KeyError)"


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200).map(lambda rest: b"\x80\x02" + rest),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    st.booleans(),
)
def test_any_pickle_is_converted_or_one_kind_of_error(
    tmp_path: Path, data: bytes, changes: list[tuple[int, int]], raw: bool
) -> None:
    if not raw:
        torch.save({"w": torch.ones(3)}, tmp_path / "m.pth", _use_new_zipfile_serialization=bool(changes))
        changed = bytearray((tmp_path / "m.pth").read_bytes())
        for place, value in changes:
            changed[place % len(changed)] = value
        data = bytes(changed)
    (tmp_path / "m.pth").write_bytes(data)
    try:
        quarantine.convert(tmp_path / "m.pth", tmp_path / "m.safetensors")
    except (BshubError, MemoryError):
        return
    assert load_file(tmp_path / "m.safetensors")


# --- what the parent makes of a child


def told(data: bytes, code: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint._refuse(data, code, "m.pth")
    return str(caught.value)


def test_a_childs_last_words_are_quoted_and_their_absence_explained() -> None:
    assert told(b'{"message": "m.pth: no\\u001b[2J", "hint": "h"}', 2) == "m.pth: no\\x1b[2J (h)"
    assert "conversion stopped by signal 9" in told(b"", -9)
    assert "conversion failed with status 1" in told(b"{}", 1)
    assert "conversion failed" in told(b"[" * 8192, 2)


def test_a_child_that_was_taken_over_points_to_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    for name, said in (("link", "no usable file"), ("none", "left no file")):
        with pytest.raises(CheckpointError, match=said):
            checkpoint._read_converted(tmp_path / name, "m.pth")


def test_a_file_for_which_there_is_no_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "m.pth")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="no process to open its pickle in"):
        checkpoint.read_checkpoint(tmp_path / "m.pth")


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_limits_are_asked_for_and_a_system_that_refuses_them_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    asked: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "setrlimit", lambda which, value: asked.update({which: value}))
    quarantine.limit_process(1 << 30)
    assert asked[resource.RLIMIT_CPU][0] <= quarantine.CPU_SECONDS
    assert asked[resource.RLIMIT_CORE][0] == 0
    assert 1 << 30 < asked[resource.RLIMIT_AS][0] < 1 << 46
    quarantine.limit_process(None)
    assert asked[resource.RLIMIT_AS][0] == resource.getrlimit(resource.RLIMIT_AS)[1]

    def refuse(*arguments: object) -> None:
        raise ValueError

    monkeypatch.setattr(resource, "setrlimit", refuse)
    monkeypatch.setattr(Path, "read_text", lambda *arguments: "no numbers")
    quarantine.limit_process(1)
    monkeypatch.setattr("sys.platform", "win32")
    quarantine.limit_process(1)
