"""The dense copy: original shapes, the same function, loaded by plain timm; refused where it cannot be that."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import nets
import pytest
import torch
from conftest import DEMO, Artifact, bshub_command
from nets import Concat, Gate, Halves, Net, Residual, Shuffle, conv_bn, head, logits, relative_error
from safetensors.torch import load_file
from torch import nn

import bshub
from bshub.errors import ExportError
from bshub.files import sha256
from bshub.intake.recipe import Recipe
from bshub.release.dense import scatter


def depthwise() -> nn.Sequential:
    return nn.Sequential(conv_bn(3, 12), conv_bn(12, 12, groups=12, act=nn.SiLU), conv_bn(12, 10, 1), head(10))


NETS = {
    "residual": nets.residual_net,
    "linear after a flattened map": nets.vgg_like,
    "depthwise": depthwise,
    "side by side": lambda: nn.Sequential(Concat(conv_bn(3, 6), conv_bn(3, 5)), conv_bn(11, 8), head(8)),
    "gate": lambda: nn.Sequential(conv_bn(3, 12), Gate(12, 4), conv_bn(12, 8), head(8)),
    "grouped": lambda: nn.Sequential(conv_bn(3, 12), Shuffle(3), conv_bn(12, 12, groups=3), head(12)),
    "halves": lambda: nn.Sequential(conv_bn(3, 12), Halves(conv_bn(6, 6)), conv_bn(12, 8), head(8)),
    "sigmoid": lambda: nn.Sequential(conv_bn(3, 8, act=nn.Sigmoid), Residual(conv_bn(8, 8)), head(8)),
}


@pytest.mark.parametrize("name", NETS)
def test_a_dense_copy_computes_what_the_small_network_computes(name: str) -> None:
    torch.manual_seed(0)
    net = Net(NETS[name]())
    removal = net.remove(net.flags(0.4))
    full = copy.deepcopy(net.model)
    recipe = Recipe(removal.attributes, removal.plan.kept)
    dense = scatter(removal.model.state_dict(), recipe, full.state_dict())
    assert sum(tensor.numel() for tensor in dense.values()) > sum(p.numel() for p in removal.model.parameters())
    full.load_state_dict(dense)
    assert relative_error(full, removal.model, net.images) < 1e-5
    for tensor, axes in recipe.kept.items():
        gone = torch.ones(dense[tensor].shape, dtype=torch.bool)
        gone[
            torch.meshgrid(*(torch.tensor(axes.get(a, range(n))) for a, n in enumerate(gone.shape)), indexing="ij")
        ] = False
        wanted = 1.0 if tensor.endswith("running_var") else 0.0
        assert gone.any() and bool((dense[tensor][gone] == wanted).all()), tensor


def test_what_was_sanitized_twice_goes_back_to_its_first_places() -> None:
    torch.manual_seed(0)
    net = Net(nets.residual_net())
    first = net.remove(net.flags(0.3, seed=1))
    again = Net(copy.deepcopy(first.model))  # draws new batch-norm numbers
    second = again.remove(again.flags(0.3, seed=2))
    recipe = Recipe(first.attributes, first.plan.kept).then(second.attributes, second.plan.kept)
    full = copy.deepcopy(net.model)
    full.load_state_dict(scatter(second.model.state_dict(), recipe, full.state_dict()))
    assert relative_error(full, second.model, net.images) < 1e-5


@pytest.mark.parametrize(
    "kept",
    [{"0.0.weight": {0: [0, 4, 5, 6, 99]}}, {"0.0.weight": {0: [0]}}, {}],
    ids=["beyond the end", "too few", "nothing said"],
)
def test_a_recipe_that_does_not_fit_is_refused(kept: dict[str, dict[int, list[int]]]) -> None:
    net = Net(nn.Sequential(conv_bn(3, 8), conv_bn(8, 6), head(6)))
    removal = net.remove({"0.0": [1, 2, 3]})
    assert removal.plan.kept["0.0.weight"] == {0: [0, 4, 5, 6, 7]}
    with pytest.raises(ExportError, match=r"does not fit the tensor '0\.0\.weight'"):
        scatter(removal.model.state_dict(), Recipe({}, kept), net.model.state_dict())


def test_plain_timm_loads_the_copy_and_answers_the_same(complete: Artifact) -> None:
    import timm

    dense = timm.create_model(f"local-dir:{complete.folder / 'dense'}", pretrained=True)
    small = bshub.load(str(complete.folder))
    images = torch.randn(4, 3, 64, 64)
    assert relative_error(dense, small.module, images) < 1e-5
    again = bshub.load(str(complete.folder / "dense"))
    assert torch.equal(logits(again.module, images), logits(dense, images))
    assert (again.labels, again.preprocessing.config) == (small.labels, small.preprocessing.config)
    original = load_file(DEMO / "model" / "model.safetensors")
    copied = load_file(complete.folder / "dense" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in copied.items()} == {k: v.shape for k, v in original.items()}
    assert "bshub" not in json.loads((complete.folder / "dense" / "config.json").read_text())


def test_the_copy_says_what_it_is_and_of_what(complete: Artifact) -> None:
    report = json.loads((complete.folder / "dense" / "bshub-report.json").read_text())
    assert report["kind"] == "dense copy"
    assert report["copy_of"] == {"model.safetensors": sha256(complete.folder / "model.safetensors")}
    assert report["proof"]["holds"] and report["proof"]["error"] <= 1e-5
    assert set(report["files"]) == {"README.md", "config.json", "model.safetensors"}
    card = (complete.folder / "dense" / "README.md").read_text(encoding="utf-8")
    assert "compatibility copy" in card and "can bring back" in card
    whole = json.loads((complete.folder / "bshub-report.json").read_text())
    assert {name for name in whole["files"] if name.startswith("dense/")} == {
        f"dense/{path.name}" for path in (complete.folder / "dense").iterdir()
    }


def test_a_network_that_timm_cannot_name_is_refused_before_any_work(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    from bshub.intake.recipe import replace_stem

    model = timm.create_model("test_resnet", num_classes=10)
    replace_stem(model)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    result = bshub_command(
        "sanitize", tmp_path / "w.safetensors", "--arch", "timm/test_resnet?num_classes=10&stem=cifar&input_size=32",
        "--clean-dir", DEMO / "clean", "--dense", "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "has no dense copy" in result.stderr
    assert not (tmp_path / "out").exists()
