"""Several processes come to the plan of one: the exchange itself, and the real launcher on the demo model."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from little_nets import Mixed, coloured_images
from nets import randomize_batch_norm
from torch import Tensor, nn

from bshub.clean import KEPT_IMAGES, CleanImages
from bshub.errors import BshubError, InconclusiveError, UsageError
from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import find_pairs
from bshub.intake.folders import ClassFolder
from bshub.parallel import Workers, launched
from bshub.repair.finetune import Schedule, repair
from bshub.scoring.statistics import measure

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"
SIZE = (3, 11, 9)
CPU = torch.device("cpu")
T = TypeVar("T")


def together(size: int, work: Callable[[Workers], T]) -> list[T]:
    """Run ``work`` in threads that exchange tensors as processes do; returns what each came to."""
    places: list[Any] = [None] * size
    results: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)

    def exchange(rank: int, tensor: Tensor) -> list[Tensor]:
        places[rank] = tensor.clone()
        barrier.wait()
        got = [place.clone() for place in places]
        barrier.wait()
        return got

    def run(rank: int) -> None:
        try:
            results[rank] = work(Workers(rank, size, lambda tensor: exchange(rank, tensor)))
        except Exception as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, (BshubError, threading.BrokenBarrierError)):
            raise result
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("items", [0, 1, 4, 17, 1024])
def test_the_parts_follow_each_other_and_leave_nothing_out(size: int, items: int) -> None:
    parts = [list(range(items))[Workers(rank, size).part(items)] for rank in range(size)]
    assert [item for part in parts for item in part] == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("size", "images"), [(2, 21), (3, 21), (4, 5)])
def test_statistics_of_several_processes_are_those_of_one(size: int, images: int) -> None:
    torch.manual_seed(1)
    net = randomize_batch_norm(Mixed(), seed=3)
    x, y = torch.randn(images, *SIZE), torch.arange(images) % 4
    pairing = find_pairs(net, follow_channels(net, SIZE)[0])
    alone = measure(net, pairing, [(x, y)], taylor=True)

    def work(workers: Workers) -> Any:
        own = copy.deepcopy(net)
        mine = workers.part(images)
        batches = zip(x[mine].split(3), y[mine].split(3), strict=True)
        return measure(own, pairing, batches, taylor=True, workers=workers)

    results = together(size, work)
    for found in results:
        for name, expected in alone.items():
            for statistic in ("spectral", "saliency", "activation", "correlation", "bn_shift", "taylor"):
                got, want = getattr(found[name], statistic), getattr(expected, statistic)
                torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
                assert torch.equal(got, getattr(results[0][name], statistic)), "processes disagree"


@pytest.mark.parametrize(("size", "images"), [(2, 40), (3, 10), (2, KEPT_IMAGES + 300), (3, 2 * KEPT_IMAGES)])
def test_every_process_keeps_the_images_that_one_would(size: int, images: int) -> None:
    x, y = torch.arange(images).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), torch.arange(images) % 7
    alone = CleanImages([(x, y)], CPU)
    alone.drain()

    def work(workers: Workers) -> tuple[Tensor, Tensor, int]:
        mine = workers.part(images)
        clean = CleanImages(zip(x[mine].split(16), y[mine].split(16), strict=True), CPU, workers=workers)
        list(clean.stream())
        clean.join()
        return clean.images, clean.labels, clean.count

    for got_x, got_y, count in together(size, work):
        assert torch.equal(got_x, alone.images)
        assert torch.equal(got_y, alone.labels)
        assert count == images


def test_three_images_in_two_processes_are_too_few_as_in_one() -> None:
    x, y = torch.zeros(3, 3, 2, 2), torch.zeros(3).long()
    results = together(2, lambda workers: CleanImages([(x[workers.part(3)], y[workers.part(3)])], CPU, None, workers))
    assert not any(isinstance(result, CleanImages) for result in results)
    assert any(isinstance(result, InconclusiveError) for result in results)


@pytest.mark.parametrize("size", [2, 3])
def test_a_repair_in_several_processes_is_that_of_one(trained: nn.Module, size: int) -> None:
    images, labels = coloured_images(34, seed=99)
    schedule = Schedule(epochs=3, lr=0.01, batch_size=11, seed=7)  # a last batch of one image: nothing for some

    def work(workers: Workers) -> nn.Module:
        model = copy.deepcopy(trained)
        repair(model, copy.deepcopy(trained), images, labels, {}, "finetune", schedule, workers=workers)
        return model

    (alone,) = together(1, work)
    several = together(size, work)
    assert not torch.equal(alone.conv1.weight, trained.conv1.weight)
    for model in several:
        for (name, got), want, first in zip(
            model.named_parameters(), alone.parameters(), several[0].parameters(), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5, msg=name)
            assert torch.equal(got, first), "processes disagree"


@pytest.mark.parametrize(("total", "count"), [(10, 20), (20, 20), (21, 20), (1000, 64), (7, 3)])
def test_the_first_images_of_a_mixed_folder_are_of_all_classes(total: int, count: int) -> None:
    labels = tuple(sorted(index % 5 for index in range(total)))  # class after class, as a folder is listed
    folder = ClassFolder(Path("x"), tuple(Path(str(i)) for i in range(total)), labels, "names")
    mixed = folder.mixed(count)
    assert sorted(zip(mixed.paths, mixed.labels, strict=True)) == sorted(zip(folder.paths, labels, strict=True))
    share = min(count, total) / 5
    if total > count:
        assert all(abs(mixed.labels[:count].count(label) - share) <= 1 for label in range(5))
    else:
        assert mixed == folder


def test_one_process_is_alone_whatever_a_cluster_left_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "8", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert launched().size == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UsageError, match="one device"):
        launched("cuda:1")


def _launch(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launcher, *plain, "-m", "bshub", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )


def test_two_launched_processes_write_the_artifact_of_one(tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    for folder in (DEMO / "clean").iterdir():
        shutil.copytree(folder, clean / folder.name)
        for image in sorted((clean / folder.name).iterdir())[3:]:
            image.unlink()
    arguments = ["sanitize", str(DEMO / "model"), "--clean-dir", str(clean), "--score", "bss"]
    arguments += ["--no-onnx", "--no-report", "--finetune-epochs", "2", "--json"]
    done = _launch(tmp_path, *arguments, "--output", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # one document: the second process says nothing
    command = [sys.executable, "-m", "bshub", *arguments, "--output", str(tmp_path / "one")]
    one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert two["counts"]["flagged"] > 0
    for key in ("flagged", "threshold"):
        assert two["diagnosis"][key] == one["diagnosis"][key]
    for key in ("removed", "silenced", "clean_images", "parameters", "images"):
        assert two[key] == one[key], key
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


def test_a_launched_gate_is_refused_once(tmp_path: Path) -> None:
    done = _launch(tmp_path, "gate", "somewhere")
    assert done.returncode == 1  # the launcher's own
    assert done.stderr.count("bshub: gate runs in one process") == 1
