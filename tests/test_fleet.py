"""A fleet: each model once, whatever becomes of workers and drivers; what is bad stops nobody else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import timm
import torch
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st
from nets import randomize_batch_norm
from safetensors.torch import save_file

from bshub.errors import OutputError, UsageError
from bshub.fleet.entries import Entry, folder_digest, read_entries
from bshub.fleet.store import Store
from bshub.fleet.summary import COLUMNS, page, parquet
from bshub.fleet.task import Job, clean, folder_name, identify
from bshub.settings import Settings

QUICK = Settings(score="lipschitz", mu=2.5, finetune_epochs=0)


def model_folder(place: Path, seed: int) -> Path:
    """A tiny network with ten classes in timm's layout."""
    torch.manual_seed(seed)
    network = randomize_batch_norm(timm.create_model("test_resnet", num_classes=10), seed)
    place.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, place / "model.safetensors")
    config = {"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (place / "config.json").write_text(json.dumps(config))
    return place


def job(output: object, **other: Any) -> Job:
    clean_dir = DEMO / "clean"
    fixed = {"settings": QUICK, "onnx": False, "page": False}
    return Job(str(clean_dir), folder_digest(clean_dir), output=str(output), **{**fixed, **other})


def listed(tmp_path: Path, *lines: object) -> Path:
    (tmp_path / "models.txt").write_text("".join(f"{line}\n" for line in lines))
    return tmp_path / "models.txt"


def test_a_list_is_written_as_one_would_type_it(tmp_path: Path) -> None:
    path = listed(
        tmp_path, "# ours", "", "timm/resnet18  # a name", "'a b.pth' --num-classes 7 --arch timm/vgg11", "a/b", "a/b"
    )
    assert read_entries(path) == (Entry("timm/resnet18"), Entry("a b.pth", "timm/vgg11", 7), Entry("a/b"))


@pytest.mark.parametrize(
    "line",
    ["--arch x", "a --arch", "a --nonsense 3", "a --num-classes x", "a --num-classes 1", "a b c", "'a", "# only"],
)
def test_a_line_that_is_not_understood_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(UsageError, match="lists no model" if line.startswith("#") else "line 1"):
        read_entries(listed(tmp_path, line))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_list_or_one_kind_of_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    try:
        assert all(isinstance(entry, Entry) for entry in read_entries(path))
    except UsageError as error:
        assert str(error).isprintable()


@given(st.text(max_size=90), st.text("0123456789abcdef", min_size=64, max_size=64))
def test_a_folder_name_is_one_safe_name_on_any_system(reference: str, key: str) -> None:
    name = folder_name(reference, key)
    assert name.isascii() and len(name) <= 80 and not set(name) & set('/\\:*?"<>| ') and not name.startswith(".")


def test_the_key_follows_weights_images_and_settings_and_nothing_else(tmp_path: Path) -> None:
    one, same, other = (model_folder(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    base = job(tmp_path / "out")

    def key(folder: Path, job: Job = base) -> str:
        return str(identify(Entry(str(folder)), job)["key"])

    assert key(one) == key(same) == key(one, job(tmp_path / "elsewhere")) == key(one, job(tmp_path / "out", threads=4))
    different = {
        key(one),
        key(other),
        key(one, job(tmp_path, settings=Settings(mu=3.0))),
        key(one, job(tmp_path, onnx=True)),
    }
    assert len(different) == 4
    assert identify(Entry(str(tmp_path / "none")), base)["state"] == "refused"


def test_a_model_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "a", 0)
    place = job(tmp_path / "out")
    entry = Entry(str(folder))
    key = identify(entry, place)["key"]
    first = clean(entry, key, place)
    assert first["state"] == "cleaned" and first["removed"] + first["silenced"] == first["flagged"] > 0
    report = tmp_path / "out" / first["folder"] / "bshub-report.json"
    before = report.stat()
    assert clean(entry, key, place) == first == {**identify(entry, place)}
    # killed between artifact and record
    (tmp_path / "out" / "records" / f"{key}.json").unlink()
    again = clean(entry, key, place)
    changing = ("seconds", "finished")
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in first.items() if k not in changing
    }
    assert (report.stat().st_ino, report.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_object_store_gets_the_artifact_with_its_manifest_last(tmp_path: Path) -> None:
    entry = Entry(str(model_folder(tmp_path / "a", 0)))
    place = job("memory://fleet-test")
    row = clean(entry, identify(entry, place)["key"], place)
    files = fsspec.filesystem("memory")
    names = {path.rpartition("/")[2]: files.created(path) for path in files.find(f"/fleet-test/{row['folder']}")}
    assert {"model.safetensors", "config.json", "README.md", "bshub-report.json"} <= names.keys()
    assert max(names, key=lambda name: names[name]) == "bshub-report.json"
    assert Store("memory://fleet-test").record(row["key"]) == row


def test_what_is_bad_is_refused_with_a_reason_that_lasts(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "a", 0)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    place = job(tmp_path / "out")
    entry = Entry(str(folder))
    row = clean(entry, identify(entry, place)["key"], place)
    assert row["state"] == "refused" and "model.safetensors" in row["reason"]
    assert identify(entry, place) == row
    assert list((tmp_path / "out").rglob("bshub-report.json")) == []


def test_an_unexpected_error_is_a_failure_that_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError(f"no luck with {os.environ['HF_TOKEN']}")

    entry = Entry(str(model_folder(tmp_path / "a", 0)))
    place = job(tmp_path / "out")
    key = identify(entry, place)["key"]
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    with monkeypatch.context() as patch:
        patch.setattr("bshub.commands.sanitize_to_folder", broken)
        row = clean(entry, key, place)
    assert (row["state"], row["reason"]) == ("failed", "RuntimeError: no luck with ***")
    assert clean(entry, key, place)["state"] == "cleaned"


@pytest.mark.skipif(sys.platform != "linux", reason="the cap counts what Linux counts")
def test_a_model_that_takes_too_much_memory_fails_alone(tmp_path: Path, child_environment: dict[str, str]) -> None:
    folder = model_folder(tmp_path / "a", 0)
    code = f"""
import json
from bshub.fleet.entries import Entry
from bshub.fleet.task import *
import bshub.commands, torch
quick = Settings(score="lipschitz", mu=2.5, finetune_epochs=0)
place = Job({str(DEMO / "clean")!r}, "", quick, {str(tmp_path / "out")!r}, onnx=False, page=False)
real = bshub.commands.sanitize_to_folder
bshub.commands.sanitize_to_folder = lambda *a, **k: torch.ones(1 << 30)
import dataclasses
print(json.dumps(clean(Entry({str(folder)!r}), "k", dataclasses.replace(place, memory_bytes=1 << 30))))
bshub.commands.sanitize_to_folder = real
print(json.dumps(clean(Entry({str(folder)!r}), "k", place)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment, capture_output=True, text=True, check=True
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["state"], first["reason"]) == ("failed", "MemoryError: more memory than it may take")
    assert second["state"] == "cleaned"


def test_the_summary_holds_every_row_and_foreign_text_is_inert(tmp_path: Path) -> None:
    import pyarrow.parquet

    bad = {
        "reference": "<script>alert(1)</script>",
        "key": "k",
        "state": "failed",
        "reason": "<b>x</b>",
        "seconds": 1.0,
    }
    entry = Entry(str(model_folder(tmp_path / "a", 0)))
    place = job(tmp_path / "out")
    rows = [bad, clean(entry, identify(entry, place)["key"], place)]
    (tmp_path / "x.parquet").write_bytes(parquet(rows))
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["state"] for row in table] == ["failed", "cleaned"] and table[0].keys() == COLUMNS.keys()
    assert all(table[1][name] == rows[1].get(name) for name in COLUMNS)
    text = page(rows)
    assert "<script>" not in text and "<b>x" not in text and rows[1]["folder"] in text


def test_a_place_without_a_file_system_is_refused() -> None:
    with pytest.raises(OutputError, match="cannot be written to"):
        Store("nonsense://bucket")


def fleet_command(models: Path, output: Path) -> list[str]:
    return [
        sys.executable, "-c", "from bshub_cli.main import app; app()", "fleet", str(models),
        "--clean-dir", str(DEMO / "clean"), "-o", str(output), "--workers", "2", "--score", "lipschitz", "--mu", "2.5",
        "--no-onnx", "--no-report", "--json",
    ]  # fmt: skip


@pytest.mark.slow
def test_thirty_models_survive_two_killed_workers_and_one_killed_driver(
    tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """Nothing is lost, and nothing that was finished is done again."""
    folders = [model_folder(tmp_path / f"m{seed:02}", seed) for seed in range(29)]
    (tmp_path / "bad").mkdir()
    models, output = listed(tmp_path, *folders, tmp_path / "bad"), tmp_path / "out"
    records = output / "records"
    driver = subprocess.Popen(
        fleet_command(models, output), env=child_environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    killed = []
    for wanted in (3, 7):  # a worker is killed once so many models are done
        wait_for(records, wanted, driver)
        killed.append(kill_a_worker(driver.pid))
    wait_for(records, 12, driver)
    driver.kill()
    driver.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert len(killed) == 2 and 12 <= len(finished) < 29
    done = subprocess.run(
        fleet_command(models, output), env=child_environment, capture_output=True, text=True, timeout=540
    )
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["states"] == {"cleaned": 29, "refused": 1}
    assert [row["reference"] for row in report["rows"]] == [str(path) for path in (*folders, tmp_path / "bad")]
    assert len({row["key"] for row in report["rows"]}) == 30
    after = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert len(after) == 29 and all(after[name] == when for name, when in finished.items())
    # a worker may have written one more record after its driver died
    assert sum(row["attempts"] == 0 for row in report["rows"]) >= len(finished) + 1
    assert len(list((output / "models").iterdir())) == len(list(output.rglob("bshub-report.json"))) == 29
    assert {"fleet.parquet", "fleet.html"} <= {path.name for path in output.iterdir()}


def wait_for(records: Path, count: int, driver: subprocess.Popen[bytes]) -> None:
    """Until so many models have a record."""
    while len(list(records.glob("*.json"))) < count:
        try:
            driver.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the driver ended with {driver.returncode}")


def kill_a_worker(driver: int) -> int:
    """SIGKILL to a process of this driver's Ray that works on a model just now."""
    while True:
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                title = line.read_bytes()
                if title.startswith(b"ray::clean") and session_of(line.parent) == driver:
                    os.kill(int(line.parent.name), signal.SIGKILL)
                    return int(line.parent.name)
            except OSError:  # it ended meanwhile
                continue


def session_of(process: Path) -> int:
    """The session that a process belongs to, its sixth field in ``stat``."""
    return int((process / "stat").read_text().rpartition(")")[2].split()[3])
