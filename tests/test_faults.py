"""Faults of a real run: killed, interrupted, out of room, two at once. The earlier output survives, a rerun works."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad.bench import ARCH, contents, make_images, make_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX processes")
if hasattr(os, "fork"):
    from bad.runs import Runs

KILLS = 30
FILES = {"README.md", "bom.cdx.json", "bshub-report.json", "config.json", "metrics.json", "model.safetensors"}


@pytest.fixture(scope="module")
def runs(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    warm = [*command, tmp_path_factory.mktemp("warm") / "out", "--finetune-epochs", 0]
    with Runs(environment, *warm) as runs:
        yield runs


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A whole run on a small model, a second or so; what follows is the output."""
    root = tmp_path_factory.mktemp("inputs")
    model, clean = make_model(root / "model"), make_images(root / "clean")
    options = ["--no-onnx", "--no-report", "--score", "lipschitz", "--mu", 2, "--finetune-epochs", 1, "--overwrite"]
    return ["sanitize", model, "--clean-dir", clean, *options, "-o"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def whole(folder: Path) -> bool:
    """Whether a folder is an output of ours in which every file is the one that the report describes."""
    from bshub.files import sha256

    if {path.name for path in folder.iterdir()} != FILES:
        return False
    listed = json.loads((folder / "bshub-report.json").read_text())["files"]
    return all(sha256(folder / name) == entry["sha256"] for name, entry in listed.items())


def earlier(folder: Path) -> dict[str, bytes]:
    """An earlier output, and its contents."""
    folder.mkdir(parents=True)
    (folder / "bshub-report.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"an earlier model")
    return contents(folder)


def test_killed_at_random_points_the_earlier_output_or_the_new_one_is_whole(
    tmp_path: Path, runs: Runs, command: list[object], log: Path
) -> None:
    """Half of the kills at random times, half before a random change of the file system; the next run is the rerun."""
    folder = tmp_path / "outputs" / "out"
    before = earlier(folder)
    status, seconds = min(runs.run(*command, folder, log=log) for _ in range(2))
    assert status == 0, log.read_text()
    assert whole(folder)
    rng = random.Random(0)
    ends, survivors = [], {"old": 0, "new": 0}
    for kill in range(KILLS):
        for path in folder.iterdir():
            path.unlink()
        for name, data in before.items():
            (folder / name).write_bytes(data)
        if kill % 2:
            fault = {"changes": rng.randrange(30), "folder": str(folder.parent)}
        else:
            fault = {"seconds": rng.uniform(0, seconds)}
        ends.append(runs.run(*command, folder, log=log, signal=signal.SIGKILL, **fault)[0])
        now = contents(folder)  # the folder is there, under its own name, at any moment
        assert now == before or whole(folder)
        survivors["old" if now == before else "new"] += 1
        if kill % 10 == 9:
            status, _ = runs.run(*command, folder, log=log)
            assert status == 0, log.read_text()
            assert whole(folder)
            assert [path.name for path in folder.parent.iterdir()] == ["out"]  # the litter of ten kills is gone
    assert ends.count(-signal.SIGKILL) >= KILLS / 2
    assert survivors["old"] >= KILLS / 3


@pytest.mark.parametrize("limit", [0, 1000, 100_000, 1_400_000])
def test_without_room_the_earlier_output_stays(
    tmp_path: Path, runs: Runs, command: list[object], log: Path, limit: int
) -> None:
    """No file may grow beyond the limit, as on a full disk; what is printed goes to a pipe-sized log below it."""
    folder = tmp_path / "outputs" / "out"
    before = earlier(folder)
    status, _ = runs.run(*command, folder, log="/dev/null", limit=limit)
    assert status == 2
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_without_room_the_message_says_so(tmp_path: Path, runs: Runs, command: list[object], log: Path) -> None:
    assert runs.run(*command, tmp_path / "outputs" / "out", log=log, limit=100_000)[0] == 2
    text = log.read_text()
    assert "bshub: writing" in text and "File too large" in text and "free space, then rerun" in text
    assert "Traceback" not in text and "unexpected" not in text
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("fault", ["half way", "while it writes"])
def test_ctrl_c_ends_with_130_and_removes_what_was_begun(
    tmp_path: Path, runs: Runs, command: list[object], log: Path, fault: str
) -> None:
    folder = tmp_path / "outputs" / "out"
    before = earlier(folder)
    # change 1 is the lock, 2 the temporary folder, and the first file follows
    changes = 2 if fault == "half way" else 5
    status, _ = runs.run(*command, folder, log=log, signal=signal.SIGINT, changes=changes, folder=str(folder.parent))
    assert status == 130, log.read_text()
    assert "interrupted; nothing was left behind" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_of_two_runs_at_once_one_writes_and_one_is_refused(tmp_path: Path, runs: Runs, command: list[object]) -> None:
    folder = tmp_path / "outputs" / "out"
    logs = [tmp_path / "log1", tmp_path / "log2"]
    runs.start(*command, folder, log=logs[0], beside=True)
    runs.start(*command, folder, log=logs[1])
    ends = sorted(runs.wait()[0] for _ in range(2))
    texts = sorted((log.read_text() for log in logs), key=lambda text: "another run" in text)
    assert ends[0] == 0
    assert "written: " in texts[0]
    # where one had ended before the other took the lock, both have written
    assert (ends[1], "another run is writing" in texts[1]) in ((2, True), (0, False))
    assert whole(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_weights_file_is_read_by_the_forked_run_as_well(
    tmp_path: Path, runs: Runs, command: list[object], log: Path
) -> None:
    """The harness itself: an ordinary run through it writes what the command writes."""
    model = Path(str(command[1])) / "model.safetensors"
    status, _ = runs.run("sanitize", model, "--arch", ARCH, *command[2:], tmp_path / "out", log=log)
    assert status == 0, log.read_text()
    assert whole(tmp_path / "out")
