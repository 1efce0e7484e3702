"""A network is built only as large as it may be, and nothing of the watch over it stays behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.modules import module as registry

from bshub.errors import ModelReferenceError
from bshub.intake import build as room
from bshub.intake.build import build
from bshub.intake.models import load_model
from bshub.intake.reference import parse_architecture

HOOKS = (
    registry._global_parameter_registration_hooks,
    registry._global_buffer_registration_hooks,
    registry._global_module_registration_hooks,
)


def refused(reference: str, **limits: int) -> str:
    with pytest.raises(ModelReferenceError) as caught:
        build(parse_architecture(reference), None, **limits)
    assert not any(HOOKS)
    assert "model_args" in str(caught.value.hint) or "cannot build" in str(caught.value)
    return str(caught.value)


def test_a_network_of_the_usual_size_is_built_and_not_watched_any_longer() -> None:
    network, _, _ = build(parse_architecture("timm/test_resnet"), 3)
    assert network.num_classes == 3
    assert not any(HOOKS)
    torch.nn.Linear(10, 10)


def test_one_byte_more_than_allowed_is_too_much() -> None:
    state = timm.create_model("test_resnet").state_dict()
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    build(parse_architecture("timm/test_resnet"), None, max_bytes=size)
    assert "more than" in refused("timm/test_resnet", max_bytes=size - 1)


@pytest.mark.parametrize(
    "reference", ["timm/resnet18?channels=3000,3000,3000,3000", "torchvision/vgg11?num_classes=10"]
)
def test_a_large_network_is_stopped_before_its_weights_are_drawn(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", lambda tensor, *a, **k: drawn.append(tensor.numel()))
    assert "more than 64 MiB of weights" in refused(reference, max_bytes=64 << 20)
    assert sum(drawn) < 16 << 20


def test_too_many_modules_are_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_MODULES", 200)
    assert "more than 200 modules" in refused("timm/test_resnet?layers=999,1,1,1")


def test_a_network_beyond_the_memory_is_told_as_such() -> None:
    assert "does not fit into memory" in refused("timm/resnet18?channels=1000000000000,8,8,8")


def test_other_nonsense_is_told_as_such() -> None:
    assert "cannot build" in refused("timm/test_resnet?channels=8,-8,8,8")


def test_a_config_may_not_ask_for_much_more_than_its_weights(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=3)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_args": {"channels": [4096] * 4}}))
    with pytest.raises(ModelReferenceError, match="more than 256 MiB of weights"):
        load_model(str(tmp_path))
