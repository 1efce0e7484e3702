"""Models of the Hub and of the libraries: fetched as files, admitted through the one door; a Hub on the loopback."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from bad.bench import make_model, weights
from loopback_hub import LoopbackHub, point_client_at
from nets import randomize_batch_norm
from torch import nn

import bshub
from bshub.errors import CheckpointError, ModelReferenceError
from bshub.intake import hub as intake
from bshub.intake.models import count_classes, load_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(intake, "WAITS", (0.01, 0.01))
    with LoopbackHub() as hub:
        point_client_at(hub.url, monkeypatch, tmp_path / "cache")
        yield hub


def test_a_librarys_own_weights_come_from_its_repository_with_names_and_licence(hub: LoopbackHub) -> None:
    torch.manual_seed(0)
    net = randomize_batch_norm(timm.create_model("test_resnet"))
    repository = net.pretrained_cfg["hf_hub_id"]
    hub.seed(repository, {"model.safetensors": safetensors.torch.save(net.state_dict())})
    model = load_model("timm/test_resnet")
    assert torch.equal(model.module.conv1[0].weight, net.conv1[0].weight)
    assert model.origin.base_model == repository
    assert model.origin.licence == net.pretrained_cfg["license"]
    assert model.labels is not None and len(model.labels) == 1000 and model.labels[0] == "n01440764"


def test_a_repository_without_safetensors_is_read_from_its_pickle(hub: LoopbackHub, tmp_path: Path) -> None:
    config = (make_model(tmp_path / "model") / "config.json").read_bytes()
    torch.save(weights(), buffer := io.BytesIO())
    hub.seed("me/old", {"config.json": config, "pytorch_model.bin": buffer.getvalue()})
    model = load_model("me/old")
    assert all(torch.equal(value, weights()[name]) for name, value in model.module.state_dict().items())
    assert (model.origin.base_model, model.labels) == ("me/old", ("bird", "cat", "dog"))


def test_a_repository_without_any_weights_names_the_first_of_its_files(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.seed("me/none", {"config.json": (make_model(tmp_path / "model") / "config.json").read_bytes()})
    with pytest.raises(ModelReferenceError, match=r"holds no model\.safetensors"):
        load_model("me/none")


def test_the_number_of_classes_that_is_typed_wins(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_classes": 7}))
    with pytest.raises(CheckpointError, match=r"\[3, 96\] in the checkpoint and \[7, 96\]") as caught:
        bshub.load(str(folder))
    assert caught.value.hint is not None and caught.value.hint.endswith(": --num-classes 3")
    assert load_model(str(folder), num_classes=3).origin.num_classes == 3


@pytest.mark.parametrize(
    ("module", "said"),
    [(nn.Conv2d(3, 4, 1), "not a classifier"), (nn.Linear(9, 2), "does not run on")],
)
def test_what_gives_no_logits_is_no_classifier(module: nn.Module, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        count_classes(module, (3, 8, 8))
    assert "--arch" in str(caught.value.hint)
