"""The main job on real checkpoints: the shared starter models, and a model that comes from and goes to a Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT, bshub_command
from loopback_hub import LoopbackHub, point_client_at

import bshub

ZOO = ROOT.parent / "shared" / "zoo"
CIFAR_STEM = (
    "timm/resnet18?num_classes=10&stem=cifar&channels=32,64,128,256&input_size=32"
    "&mean=0.4914,0.4822,0.4465&std=0.247,0.2435,0.2616"
)
DEMO_FILES = ("config.json", "model.safetensors")


@pytest.mark.shared
@pytest.mark.skipif(not ZOO.is_dir(), reason="the starter models of the shared folder are not here")
def test_a_starter_model_loses_its_backdoor_with_the_defaults(tmp_path: Path, few_test_images: Path) -> None:
    result = bshub_command(
        "sanitize", ZOO / "r18w32_badnets5.safetensors", "--arch", CIFAR_STEM, "--clean-dir", DEMO / "clean",
        "--test-dir", few_test_images, "--trigger", DEMO / "trigger.json", "-o", tmp_path / "out", "--no-onnx",
        "--no-report", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    evaluation = json.loads(result.stdout)["evaluation"]
    before, after = evaluation["before"], evaluation["after"]
    assert before["asr"]["percent"] > 95
    assert after["asr"]["percent"] < before["asr"]["percent"] / 2
    assert after["accuracy"]["percent"] > before["accuracy"]["percent"] - 10  # 100 images: wide on purpose
    reloaded = bshub.load(str(tmp_path / "out"))
    assert reloaded.origin.recipe.stem == "cifar"


def test_the_demo_keeps_its_promise(tmp_path: Path) -> None:
    result = bshub_command(
        "sanitize", DEMO / "model", "--clean-dir", DEMO / "clean", "--test-dir", DEMO / "heldout",
        "--trigger", DEMO / "trigger.json", "-o", tmp_path / "out", "--no-onnx", "--no-report", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    before, after = report["evaluation"]["before"], report["evaluation"]["after"]
    assert before["asr"]["percent"] >= 95 and before["accuracy"]["percent"] >= 80
    assert after["asr"]["percent"] < before["asr"]["percent"] / 2
    assert after["accuracy"]["percent"] >= before["accuracy"]["percent"] - 3
    assert report["parameters"]["after"] < report["parameters"]["before"]
    assert report["macs"]["after"] < report["macs"]["before"]
    assert report["proof"]["holds"] and report["proof"]["error"] <= 1e-5


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        point_client_at(hub.url, monkeypatch, tmp_path / "cache")
        yield hub


def test_a_model_from_the_hub_is_the_one_on_disk(hub: LoopbackHub) -> None:
    hub.seed("them/backdoored", {name: (DEMO / "model" / name).read_bytes() for name in DEMO_FILES})
    ours, theirs = bshub.load(str(DEMO / "model")), bshub.load("them/backdoored@main")
    assert theirs.labels == ours.labels
    assert theirs.origin.base_model == "them/backdoored"
    for name, tensor in ours.module.state_dict().items():
        assert torch.equal(tensor, theirs.module.state_dict()[name])


def test_a_timm_name_takes_its_weights_from_timms_repository(hub: LoopbackHub) -> None:
    import timm
    from safetensors.torch import save

    model = timm.create_model("test_resnet")
    pretrained = model.pretrained_cfg
    weights = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    hub.seed(pretrained["hf_hub_id"], {"model.safetensors": weights})
    loaded = bshub.load("timm/test_resnet")
    assert loaded.origin.licence == pretrained.get("license")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.module.state_dict()[name])


def test_sanitize_publishes_what_it_wrote_and_the_hub_gives_it_back(hub: LoopbackHub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = bshub_command(
        "sanitize", DEMO / "model", "--clean-dir", DEMO / "clean", "-o", out, "--no-onnx",
        "--score", "lipschitz", "--mu", "3",
        "--finetune-epochs", "0", "--push-to", "me/cleaned", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    published = hub.files("me/cleaned")
    assert set(published) >= {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert b"data:image" not in published["report.html"]  # the clean images stay at home
    assert not any(str(ROOT).encode() in data for data in published.values())  # no path of this machine
    ours, theirs = bshub.load(str(out)), bshub.load("me/cleaned")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.module(images), theirs.module(images))
