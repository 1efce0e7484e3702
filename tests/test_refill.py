"""Convolutions that slide along the channels (ECA gates): neighbours of what left keep seeing zeros there."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from nets import Net, head, randomize_batch_norm
from safetensors.torch import save_file
from test_families import whole_groups
from torch import nn

from bshub.errors import CheckpointError
from bshub.intake.recipe import Recipe, apply_recipe
from bshub.release.card import loader_text


class Eca(nn.Module):
    """An efficient-channel-attention gate after a batch norm."""

    def __init__(self, stride: int = 1, circular: bool = False, kernel: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.circular, self.kernel, self.stride = circular, kernel, stride
        self.slide = nn.Conv1d(1, 1, kernel, padding=0 if circular else kernel // 2, stride=stride, bias=False)
        self.top = head(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        y = x.mean((2, 3)).unsqueeze(1)
        if self.circular:
            y = nn.functional.pad(y, (self.kernel // 2, self.kernel // 2), mode="circular")
        y = self.slide(y)
        gate = y.sigmoid().transpose(1, 2).unsqueeze(-1) if self.stride == 1 else y.mean().sigmoid()
        return self.top(x * gate)


def neighbours(flagged: list[int]) -> tuple[Net, nn.Module]:
    torch.manual_seed(0)
    net = Net(Eca(), 8)
    removal = net.remove_exactly({"body.0": flagged})
    assert removal.refused == []
    return net, removal.model


@pytest.mark.parametrize("flagged", [[0], [11], [3, 4, 5], [0, 2, 4, 6, 8, 10]])
def test_a_gate_that_slides_along_the_channels_stays_exact(flagged: list[int]) -> None:
    net, small = neighbours(flagged)
    assert small.body[0].weight.shape[0] == 12 - len(flagged)
    assert not any("slides" in reason for reason in net.flow.pinned.values())
    silent = copy.deepcopy(net.model)  # a second oracle: zero from the batch norm on, through the gate's own kernel
    with torch.no_grad():
        silent.body[1].weight[flagged] = 0
        silent.body[1].bias[flagged] = 0
        wanted, found = silent(net.images), copy.deepcopy(small)(net.images)
    assert (wanted - found).abs().max() <= 1e-5 * wanted.abs().max()


def test_only_a_whole_module_of_equal_width_is_refilled() -> None:
    torch.manual_seed(0)
    for model in (Eca(stride=2), Eca(circular=True)):
        net = Net(model, 8)
        removal = net.remove({"body.0": [1, 2]})
        assert removal.proof.holds
        assert removal.plan.refilled == {}
        assert removal.model.body[0].weight.shape[0] == 12
        assert any("slides along" in reason or "copy meets" in reason for reason in net.flow.pinned.values())


def test_a_second_surgery_leaves_the_refilled_axis_whole() -> None:
    _, small = neighbours([2, 7])
    again = Net(small, 8)
    removal = again.remove_exactly({"body.0": [0, 1]})
    assert removal.model.body[0].weight.shape[0] == 10


def eca_net() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("ecaresnet26t", num_classes=5, block_args={"attn_layer": "eca"}, channels=[8, 8, 8, 16])


def test_recipe_and_card_rebuild_a_refilled_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(randomize_batch_norm(eca_net()), 32)
    removal = net.remove_exactly(whole_groups(net, 0.3))
    assert removal.plan.refilled
    recipe = Recipe().then(removal.attributes, removal.plan.kept, removal.plan.refilled)
    written = json.loads(json.dumps(recipe.as_json()))
    state = removal.model.state_dict()
    fresh = eca_net()
    apply_recipe(fresh, Recipe.from_json(written), state)
    fresh.load_state_dict(state)
    with torch.no_grad():
        wanted = removal.model(net.images)
        assert torch.equal(fresh.eval()(net.images), wanted)
    save_file(state, tmp_path / "model.safetensors")
    config = {
        "architecture": "ecaresnet26t", "num_classes": 5, "bshub": written,
        "model_args": {"block_args": {"attn_layer": "eca"}, "channels": [8, 8, 8, 16]},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(loader_text("timm", None, refilled=True), space)
    with torch.no_grad():  # memory-mapped weights lie elsewhere: the last bit may differ
        torch.testing.assert_close(space["model"](net.images), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "places",
    [[2, 8], [2, 8, 0, 8], [1, 8, 0, 3], [2, 8, 3, 4, 0, 1], [2, 10**9, 0, 3], ["2", 8, 0, 3], [2, 8, 0], None],
)
def test_refilled_places_out_of_range_are_refused(places: object) -> None:
    with pytest.raises(CheckpointError, match="recipe"):
        Recipe.from_json({"format": 1, "refilled": {"slide": places}})


def test_a_refilled_module_that_does_not_exist_is_refused() -> None:
    with pytest.raises(CheckpointError, match="lacks"):
        apply_recipe(Eca(), Recipe(refilled={"nowhere": (2, 4, [0, 1])}), {})
