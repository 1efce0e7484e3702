"""A poisoned training: continued bit for bit, written so that every other command can use it."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, bshub_command
from safetensors.torch import load_file
from torch import nn

import bshub
from bshub.attack import AttackSettings, attack_to_folder
from bshub.errors import ImageDataError, OutputError, UsageError
from bshub.evaluation.attacks.data import open_pictures
from bshub.evaluation.attacks.state import kept, load_state, save_state
from bshub.evaluation.attacks.training import augment, layout_for, one_cycle
from bshub.evaluation.attacks.trigger import load_trigger
from bshub.evaluation.metrics import evaluate_models
from bshub.intake.folders import open_folder
from bshub.progress import Steps

ARCH = "timm/resnet18?stem=cifar&channels=4,4,8,8&input_size=16&mean=0.5,0.5,0.5&std=0.25,0.25,0.25"


class Interrupted(Exception):
    """Stands for a run that was killed."""


class KilledIn:
    """Progress that ends the run in the middle of one step."""

    def __init__(self, name: str) -> None:
        self.name = name

    @contextmanager
    def step(self, name: str, total: int | None) -> Any:
        def advance(amount: int) -> None:
            if name == self.name:
                raise Interrupted

        yield advance


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and two test images of each class of the demo."""
    root = tmp_path_factory.mktemp("data")
    for source in sorted((DEMO / "clean").iterdir()):
        for split, images in (("train", slice(0, 6)), ("test", slice(6, 8))):
            (root / split / source.name).mkdir(parents=True)
            for image in sorted(source.iterdir())[images]:
                shutil.copy(image, root / split / source.name)
    return root


def settings(attack: str = "badnets", **given: Any) -> AttackSettings:
    options = {"input-aware": {"mask_steps": 2, "mask_batch": 8, "channels": [4]}, "label-consistent": {"steps": 2}}
    values: dict[str, Any] = {
        "arch": ARCH, "attack": attack, "rate": 0.1, "epochs": 2, "batch_size": 16, "options": options.get(attack, {}),
        "precision": "fp32",
    }  # fmt: skip
    return AttackSettings(**{**values, **given})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "badnets"
    attack_to_folder(settings(), data, folder)
    return folder


@pytest.mark.parametrize("attack", ["badnets", "input-aware", "label-consistent", "adaptive", "wanet"])
def test_a_killed_run_continues_and_ends_with_the_very_same_weights(data: Path, tmp_path: Path, attack: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    attack_to_folder(settings(attack), data, whole, device="cpu")
    with pytest.raises(Interrupted):
        attack_to_folder(settings(attack), data, broken, device="cpu", progress=KilledIn("epoch 2/2"))
    assert not broken.exists()
    assert (tmp_path / ".broken.training" / "victim" / "epoch-1.safetensors").is_file()
    record = attack_to_folder(settings(attack), data, broken, device="cpu")
    assert same(weights(whole), weights(broken))
    assert record["evaluation"] == _record(whole)["evaluation"]
    x = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    triggers = [load_trigger(folder / "trigger.json") for folder in (whole, broken)]
    assert torch.equal(triggers[0](x), triggers[1](x))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())


def test_the_folder_loads_and_answers_as_recorded(finished: Path, data: Path) -> None:
    model = bshub.load(str(finished))
    record = _record(finished)
    assert model.labels == tuple(sorted(path.name for path in (data / "train").iterdir()))
    assert model.origin.recipe.stem == "cifar"
    assert model.preprocessing.input_size == (3, 16, 16)
    trigger = load_trigger(finished / "trigger.json")
    pictures = open_pictures(open_folder(data / "test", 10, model.labels), (16, 16), Steps(), "read")
    images = pictures.read(torch.arange(20))
    both = [torch.stack([model.preprocessing(image) for image in x]) for x in (images, trigger(images))]
    (rates,) = evaluate_models([model.module], [(both[0], pictures.labels, both[1])], trigger.target)
    assert rates.as_dict() == record["evaluation"]
    assert record["evaluation"]["accuracy"]["n"] == 20
    assert record["evaluation"]["asr"]["n"] == 18


def test_the_record_names_the_poisoned_files(finished: Path, data: Path) -> None:
    poisoned = _record(finished)["poisoned"]
    assert poisoned["count"] == len(poisoned["files"]) == 6
    assert all((data / "train" / name).is_file() for name in poisoned["files"])
    assert not any(name.startswith("airplane/") for name in poisoned["files"])  # the target's own images
    assert _record(finished)["settings"]["arch"] == ARCH


def test_a_finished_run_is_not_repeated_and_another_is_not_overwritten(finished: Path, data: Path) -> None:
    before = (finished / "model.safetensors").stat().st_mtime_ns
    record = attack_to_folder(settings(), data, finished)
    assert record == _record(finished)
    assert (finished / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="not empty"):
        attack_to_folder(settings(seed=1), data, finished)


def test_an_unfinished_run_with_other_settings_is_not_continued(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        attack_to_folder(settings(), data, tmp_path / "m", progress=KilledIn("epoch 2/2"))
    with pytest.raises(OutputError, match="other settings"):
        attack_to_folder(settings(lr=0.05), data, tmp_path / "m")
    with pytest.raises(OutputError, match="other settings"):
        attack_to_folder(settings(), data, tmp_path / "m", surrogate="./elsewhere")
    record = attack_to_folder(settings(lr=0.05, epochs=1), data, tmp_path / "m", overwrite=True)
    assert record["settings"]["lr"] == 0.05


def test_the_command_trains_a_control_and_sanitize_and_evaluate_take_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--data", data, "--epochs", 1, "--batch-size", 16, "--device", "cpu"]
    result = bshub_command("attack", ARCH, *common, "--rate", 0, "-o", "clean", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["attack"] == "none"
    assert not Path("clean/trigger.json").exists()
    result = bshub_command("attack", ARCH, *common, "--attack", "blended", "--option", "alpha=0.5", "-o", "bad", "-q")
    assert result.exit_code == 0, result.output
    assert "attack success" in result.stdout
    assert _record(Path("bad"))["notes"] == {"alpha": 0.5, "pattern": "picture"}
    result = bshub_command("evaluate", "bad", "--test-dir", data / "test", "--trigger", "bad/trigger.json", "--json")
    assert result.exit_code == 0, result.output
    rates = json.loads(result.stdout)["evaluation"]
    assert rates["accuracy"]["n"] == _record(Path("bad"))["evaluation"]["accuracy"]["n"]
    result = bshub_command("sanitize", "bad", "--clean-dir", data / "train", "--dry-run", "--json")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_the_precision_is_as_told_or_measured(data: Path, tmp_path: Path, precision: str) -> None:
    record = attack_to_folder(settings(epochs=1, precision=precision), data, tmp_path / "out", device="cpu")
    assert record["history"][0]["precision"] in (["bf16", "fp32"] if precision == "auto" else [precision])


def test_any_library_and_class_folders_named_by_number_will_do(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "numbered"
    for split in ("train", "val"):
        for label, source in enumerate(sorted((data / split.replace("val", "test")).iterdir())):
            if label in (3, 7, 9):
                shutil.copytree(source, root / split / {3: "2", 7: "10", 9: "0"}[label])
    arch = "torchvision/squeezenet1_1?num_classes=12&input_size=32"
    record = attack_to_folder(settings(arch=arch, epochs=1, batch_size=8), root, tmp_path / "out")
    assert record["train_images"] == 18
    assert bshub.load(str(tmp_path / "out")).labels == tuple(str(label) for label in range(12))


REFUSALS: dict[str, tuple[str, list[str]]] = {
    "unknown attack": ("unknown attack", ["--attack", "nope"]),
    "unknown option": ("no option", ["--option", "alpha=1"]),
    "impossible option": ("alpha", ["--attack", "blended", "--option", "alpha=2"]),
    "no option": ("not an option", ["--option", "alpha"]),
    "rate": ("rate", ["--rate", "1.5"]),
    "nan": ("rate", ["--rate", "nan"]),
    "lr": ("lr", ["--lr", "0"]),
    "target": ("target 10", ["--target", "10"]),
    "epochs": ("epochs", ["--epochs", "0"]),
    "precision": ("precision", ["--precision", "int8"]),
    "test data": ("no folder at", ["--test-data", "nowhere"]),
}


@pytest.mark.parametrize(("said", "arguments"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_is_refused_in_one_line_and_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = bshub_command("attack", ARCH, "--data", data, "-o", "out", "-q", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arch", ["timm/resnet18.a1_in1k", "timm/restnet18", "resnet18", ARCH + "&num_classes=1", ARCH + "&num_classes=x"]
)
def test_networks_that_cannot_be_trained_are_refused(data: Path, tmp_path: Path, arch: str) -> None:
    assert bshub_command("attack", arch, "--data", data, "-o", tmp_path / "out", "-q").exit_code == 2


def test_data_without_a_training_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder train"):
        attack_to_folder(settings(), tmp_path, tmp_path / "out")


def test_a_training_that_diverges_is_no_success(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="diverged"):
        attack_to_folder(settings(arch="timm/test_vit?input_size=160", lr=10.0), data, tmp_path / "out")


def test_large_sets_stay_on_disk_and_give_the_same_images(data: Path, tmp_path: Path) -> None:
    folder = open_folder(data / "train", 10, None)
    held = open_pictures(folder, (16, 16), Steps(), "read")
    streamed = open_pictures(folder, (16, 16), Steps(), "read", held_bytes=1000)
    index = torch.tensor([5, 0, 17])
    assert streamed.held is None
    assert torch.equal(held.read(index), streamed.read(index))
    order = [torch.tensor([3, 1]), torch.tensor([8]), torch.tensor([2, 9])]
    for one, other in zip(held.stream(order), streamed.stream(order), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert list(streamed.stream([])) == []
    assert held.digest() == streamed.digest()
    assert held.names(index)[1] == streamed.names(index)[1] == "airplane/" + folder.paths[0].name


def test_broken_images_are_left_out_in_memory_and_named_on_disk(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "train", tmp_path / "train")
    broken = sorted((tmp_path / "train" / "cat").iterdir())[0]
    broken.write_bytes(b"no image")
    folder = open_folder(tmp_path / "train", 10, None)
    held = open_pictures(folder, (16, 16), Steps(), "read")
    assert len(held) == len(held.labels) == 59
    assert broken not in held.paths
    assert [path.parent.name for path in held.paths] == [held.names(torch.tensor([i]))[0][:-9] for i in range(59)]
    streamed = open_pictures(folder, (16, 16), Steps(), "read", held_bytes=1)
    with pytest.raises(ImageDataError, match=broken.name):
        streamed.read(torch.arange(60))


def test_augmentation_flips_and_shifts_by_at_most_a_sixteenth() -> None:
    image = torch.arange(32 * 32, dtype=torch.int32).view(1, 1, 32, 32) % 251
    images = image.to(torch.uint8).expand(64, 3, -1, -1)
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    shifts = set()
    for result in moved:
        inner = result[0, 2:-2, 2:-2]
        found = [
            (flip, dy, dx)
            for flip in (False, True)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(inner, (image.flip(3) if flip else image)[0, 0, 2 + dy : 30 + dy, 2 + dx : 30 + dx].byte())
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert {flip for flip, _, _ in shifts} == {False, True}
    assert len(shifts) > 20


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    values = [one_cycle(step / 100) for step in range(101)]
    assert values[0] == pytest.approx(0.04)
    assert max(values) == values[25] == pytest.approx(1)
    assert values[-1] == pytest.approx(1e-4)
    assert all(a < b for a, b in pairwise(values[:26]))
    assert all(a > b for a, b in pairwise(values[25:]))


def test_only_the_newest_state_is_kept_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    for epoch in (1, 2):
        save_state(tmp_path, epoch, {"w": torch.full((2,), float(epoch))}, {"x": epoch})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-2.safetensors", "state.json"]
    record, tensors = load_state(tmp_path)  # type: ignore[misc]
    assert (record["x"], record["epoch"], tensors["w"].tolist()) == (2, 2, [2.0, 2.0])
    (tmp_path / "epoch-2.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(OutputError, match="cannot be read"):
        load_state(tmp_path)


def test_expensive_tensors_are_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"a": torch.ones(2)}

    assert kept(tmp_path / "x" / "a.safetensors", make)["a"].tolist() == [1, 1]
    assert kept(tmp_path / "x" / "a.safetensors", make)["a"].tolist() == [1, 1]
    assert len(made) == 1


@pytest.mark.parametrize(("narrow", "stride", "layout"), [
    (4, 2, torch.contiguous_format), (4, 1, torch.channels_last), (16, 2, torch.channels_last),
])  # fmt: skip
def test_channels_last_is_left_alone_where_it_would_corrupt_memory(
    narrow: int, stride: int, layout: torch.memory_format
) -> None:
    """oneDNN's issue 6035: a strided 1 x 1 convolution with few input channels."""
    model = nn.Sequential(nn.Conv2d(3, narrow, 3), nn.Conv2d(narrow, 8, 1, stride=stride))
    assert layout_for(model) is layout
