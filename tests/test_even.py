"""The ONNX file has whole blocks of filters where the original had them, and computes what the small model does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import pytest
import torch
from conftest import DEMO, Artifact, bshub_command
from nets import Net, relative_error
from torch import nn

import bshub.release.even as even_module
from bshub.intake.build import build
from bshub.intake.models import LoadedModel, load_model
from bshub.intake.recipe import Recipe
from bshub.intake.reference import parse_architecture
from bshub.release.artifact import WEIGHTS, write_weights
from bshub.release.even import BLOCKS, evened
from bshub.surgery.remove import Removal

# what a removal meets: shortcuts, concatenations, depthwise chains with gates, channels that slide, shuffles, groups
NETWORKS = [
    "timm/resnet18?channels=16,24,32,40",
    "timm/resnet18?channels=16,24,32,40&stem=cifar",
    "timm/densenet121?growth_rate=8&block_config=2,3",
    "timm/mobilenetv3_small_050",
    "timm/ecaresnet26t?channels=16,16,24,32",
    "torchvision/shufflenet_v2_x0_5",
    "timm/regnetx_002",
]
SIZE = (3, 32, 32)


def loaded(reference: str, folder: Path) -> LoadedModel:
    torch.manual_seed(0)
    module, _, _ = build(parse_architecture(reference), 7)
    path = folder / WEIGHTS
    write_weights(path, module)
    return load_model(str(path), arch=reference, num_classes=7)


def thinned(source: LoadedModel, flagged: Mapping[str, Sequence[int]] | None = None) -> Removal:
    """Without the flagged filters, or a random part of every layer's."""
    net = Net(source.module, SIZE[1])
    return net.remove(net.flags(0.2) if flagged is None else flagged)


def images() -> torch.Tensor:
    return torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(1))


def recipe_of(removal: Removal, source: LoadedModel) -> Recipe:
    return source.origin.recipe.then(removal.attributes, removal.plan.kept, removal.plan.refilled)


def widths(model: nn.Module) -> dict[str, int]:
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize("reference", NETWORKS)
def test_every_layer_of_whole_blocks_is_so_again_and_the_answers_stay(reference: str, tmp_path: Path) -> None:
    source = loaded(reference, tmp_path)
    removal = thinned(source)
    before = {name: tensor.clone() for name, tensor in removal.model.state_dict().items()}
    even = evened(source, removal.model, recipe_of(removal, source), images())
    assert even.why is None and even.zeros > 0
    assert relative_error(even.model, removal.model, images()) < 1e-5
    small, now, whole = widths(removal.model), widths(even.model), widths(source.module)
    for name, width in whole.items():
        block = next((block for block in BLOCKS if width % block == 0), 1)
        assert now[name] % block == 0, (name, small[name], now[name], width)
        assert small[name] <= now[name] <= width
    assert any(width % 8 for width in small.values()), "otherwise there was nothing to do"
    assert all(torch.equal(before[name], tensor) for name, tensor in removal.model.state_dict().items())


def test_what_is_filled_up_is_zero_and_no_more_of_it_than_makes_a_block(tmp_path: Path) -> None:
    source = loaded("timm/resnet18?channels=32,32,32,32", tmp_path)
    removal = thinned(source, {"layer1.0.conv1": range(18)})  # of 32: 14 stay, 16 make a block
    even = evened(source, removal.model, recipe_of(removal, source), images())
    weight = even.model.get_parameter("layer1.0.conv1.weight")
    assert even.zeros == 2 and len(weight) == 16
    empty = weight.flatten(1).abs().sum(1) == 0
    assert int(empty.sum()) == 2
    for name in ("layer1.0.bn1.weight", "layer1.0.bn1.bias"):
        assert torch.equal(even.model.get_parameter(name) == 0, empty)
    assert bool((even.model.get_parameter("layer1.0.conv2.weight")[:, empty] == 0).all())


def test_a_network_of_odd_widths_and_one_that_lost_nothing_stay_as_they_are(tmp_path: Path) -> None:
    source = loaded("timm/resnet18?channels=15,15,15,15", tmp_path)
    removal = thinned(source, {"layer1.0.conv1": [1, 7]})
    odd = evened(source, removal.model, recipe_of(removal, source), images())
    assert odd.model is removal.model and odd.zeros == 0 and odd.why is None
    whole = evened(source, source.module, source.origin.recipe, images())
    assert whole.model is source.module and whole.facts() == {"zero_filters": 0}


def test_a_copy_that_does_not_hold_is_not_used_and_the_report_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = loaded("timm/resnet18?channels=16,16,16,16", tmp_path)
    removal = thinned(source)
    right, recipe = even_module.full_network, recipe_of(removal, source)

    def wrong(*args: object) -> nn.Module:
        full = right(*args)  # type: ignore[arg-type]
        nn.init.normal_(full.get_submodule("fc").weight)  # type: ignore[arg-type]
        return full

    monkeypatch.setattr(even_module, "full_network", wrong)
    even = evened(source, removal.model, recipe, images())
    assert even.model is removal.model and "logits would differ" in str(even.facts()["uneven"])
    monkeypatch.undo()
    broken = Recipe({}, {"conv1.weight": {0: [0]}})
    assert "does not fit" in str(evened(source, removal.model, broken, images()).why)


def test_the_files_of_an_artifact_and_of_an_export_are_in_whole_blocks(complete: Artifact, tmp_path: Path) -> None:
    filled = json.loads((complete.folder / "metrics.json").read_text())["onnx"]["zero_filters"]
    assert filled > 0
    assert f"{filled} filters of zeros" in (complete.folder / "README.md").read_text(encoding="utf-8")
    result = bshub_command("export", complete.folder, tmp_path / "again.onnx", "--clean-dir", DEMO / "clean", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parity"]["zero_filters"] == filled
    for path in (complete.folder / "model.onnx", tmp_path / "again.onnx"):
        graph = onnx.load(str(path)).graph
        shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        convolutions = [shapes[node.input[1]] for node in graph.node if node.op_type == "Conv"]
        assert convolutions and all(shape[0] % 8 == 0 for shape in convolutions)
