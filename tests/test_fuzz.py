"""The fuzzers' own targets hold on their seeds, and a short run of each finds nothing; ``make fuzz`` takes longer."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from fuzz.__main__ import NAMES
from fuzz.targets import TARGETS, TEXTS, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bshub.intake import quarantine


@pytest.fixture(autouse=True)
def no_walls(monkeypatch: pytest.MonkeyPatch) -> None:
    for wall in ("limit_process", "forbid_natively", "forbid_python"):
        monkeypatch.setattr(quarantine, wall, lambda *arguments: None)


@pytest.mark.parametrize("target", TARGETS)
def test_the_seeds_reach_what_is_fuzzed(tmp_path: Path, target: str) -> None:
    (tmp_path / "in").mkdir()
    assert target in NAMES
    assert len(seeds(target)) >= 8
    for data in seeds(target):
        TARGETS[target](data, tmp_path / "in")


def test_every_kind_of_text_has_a_sound_seed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cat").mkdir()
    for (kind, read), data in zip(TEXTS.items(), seeds("text"), strict=True):
        assert read(data[1:], tmp_path / "in") is not None, kind


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(list(TARGETS)), st.integers(0, 20), st.lists(st.tuples(st.integers(0, 999), st.binary(max_size=3)))
)
def test_changed_seeds_keep_the_promise(
    tmp_path: Path, target: str, which: int, changes: list[tuple[int, bytes]]
) -> None:
    (tmp_path / "in").mkdir(exist_ok=True)
    data = seeds(target)[which % len(seeds(target))]
    for place, new in changes:
        place %= len(data) + 1
        data = data[:place] + new + data[place + len(new) :]
    TARGETS[target](data, tmp_path / "in")


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this platform")
def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    child = subprocess.run(
        [sys.executable, "-m", "fuzz", "8"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    counts = re.findall(r"(\w+) ([\d,]+) executions", child.stdout)
    assert "nothing found" in child.stdout and [name for name, _ in counts] == list(NAMES)
    assert all(int(count.replace(",", "")) > 20 for _, count in counts)
    assert list(tmp_path.iterdir()) == []
