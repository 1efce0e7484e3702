"""Numbers that mirror widths, and the recipe that rebuilds a narrowed model."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from nets import Net, conv_bn, head, logits, randomize_batch_norm, residual_net, vgg_like
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.errors import CheckpointError
from bshub.intake.recipe import Recipe, apply_recipe, replace_stem
from bshub.surgery.remove import Removal

INDICES = st.lists(st.integers(0, 300), unique=True).map(sorted)
NAMES = st.text("abc.", min_size=1, max_size=8)
RECIPES = st.builds(
    Recipe,
    attributes=st.dictionaries(NAMES, st.dictionaries(NAMES, st.integers(1, 99))),
    kept=st.dictionaries(NAMES, st.dictionaries(st.integers(0, 3), INDICES)),
    stem=st.sampled_from((None, "cifar")),
)


def resnet(widths: tuple[int, ...] = (8, 16, 24, 32)) -> nn.Module:
    return timm.create_model("resnet18", channels=widths, num_classes=5)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "residual": residual_net,
    "vgg": vgg_like,
    "resnet": resnet,
    "test_resnet": lambda: timm.create_model("test_resnet", num_classes=5),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
    "mobilenetv2": lambda: torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=5),
    "densenet": lambda: timm.create_model("densenet121", growth_rate=4, block_config=(2, 2), num_classes=5),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5),
}
TIMM = ("resnet", "test_resnet", "mobilenetv3", "densenet")


def build(name: str) -> Net:
    torch.manual_seed(0)
    return Net(FAMILIES[name](), 16 if name in ("residual", "vgg") else 32)


def narrowed(name: str, fraction: float = 0.5) -> tuple[Net, Removal]:
    net = build(name)
    return net, net.remove_exactly(net.flags(fraction, 7))


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_describe_their_own_tensors(name: str) -> None:
    _, removal = narrowed(name)
    for module in removal.model.modules():
        if isinstance(module, nn.Conv2d):
            out, inputs = module.weight.shape[:2]
            assert (module.out_channels, module.in_channels) == (out, inputs * module.groups)
            assert out % module.groups == 0
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_mean)
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)


@pytest.mark.parametrize("name", TIMM)
def test_timms_numbers_are_true(name: str) -> None:
    net, removal = narrowed(name)
    model = removal.model
    seen = {}
    for record in model.feature_info:
        module = model.get_submodule(record["module"])
        module.register_forward_hook(lambda m, a, out, key=record["module"]: seen.update({key: out.shape[1]}))
    logits(model, net.images)
    assert [(r["module"], r["num_chs"]) for r in model.feature_info] == [
        (r["module"], seen[r["module"]]) for r in model.feature_info
    ]
    with torch.no_grad():
        features = model.forward_features(net.images)
        pooled = model.forward_head(features, pre_logits=True)
    assert model.num_features == features.shape[1]
    assert model.head_hidden_size == pooled.shape[1] == model.get_classifier().in_features
    assert torch.equal(model.get_classifier()(pooled), logits(model, net.images))
    assert [record["num_chs"] for record in net.model.feature_info] != [r["num_chs"] for r in model.feature_info]


def test_a_stage_of_the_same_width_does_not_change_num_features() -> None:
    net = Net(resnet((8, 16, 24, 24)), 32)
    writers = ("layer3.0.conv2", "layer3.0.downsample.0", "layer3.1.conv2")
    model = net.remove_exactly({name: [0, 1] for name in writers}).model
    assert model.num_features == model.head_hidden_size == model.get_classifier().in_features == 24
    assert [record["num_chs"] for record in model.feature_info][-2:] == [22, 24]


class OwnWidthInTheHead(nn.Module):
    """The features and the hidden layer inside the head have one width, and only the latter is narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(3, 8)
        self.head = nn.Sequential(conv_bn(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        self.num_features = self.head_hidden_size = 8

    def get_classifier(self) -> nn.Module:
        return self.head[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def test_the_heads_hidden_width_is_the_one_that_the_classifier_takes() -> None:
    model = Net(OwnWidthInTheHead()).remove_exactly({"head.0.0": [1, 2, 5]}).model
    assert (model.num_features, model.head_hidden_size) == (8, 5)


def test_a_depthwise_convolution_keeps_its_multiplier() -> None:
    net = Net(nn.Sequential(conv_bn(3, 8), conv_bn(8, 16, groups=8), conv_bn(16, 6, 1), head(6)))
    conv = net.remove_exactly({"0.0": [1, 2, 6]}).model[1][0]
    assert (conv.in_channels, conv.out_channels, conv.groups) == (5, 10, 5)


def test_a_grouped_convolution_keeps_its_number_of_groups() -> None:
    net = Net(nn.Sequential(conv_bn(3, 8), conv_bn(8, 12, groups=4), conv_bn(12, 6, 1), head(6)))
    conv = net.remove_exactly({"0.0": [1, 3, 5, 7], "1.0": [0, 3, 6, 9]}).model[1][0]
    assert (conv.in_channels, conv.out_channels, conv.groups) == (4, 8, 4)


@given(RECIPES)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_json(json.loads(json.dumps(recipe.as_json()))) == recipe


def test_kept_indices_are_written_as_ranges() -> None:
    data = Recipe(kept={"w": {0: [0, 1, 2, 5, 7, 8]}}).as_json()
    assert data["kept"] == {"w": {"0": [0, 2, 5, 5, 7, 8]}}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "recipe",
        {"format": 2},
        {"stem": "imagenet"},
        {"attributes": 3},
        {"attributes": {"conv": 3}},
        {"kept": {"w": [1]}},
        {"kept": {"w": {"axis": [0, 1]}}},
        {"kept": {"w": {"0": [0]}}},
        {"kept": {"w": {"0": [3, 1]}}},
        {"kept": {"w": {"0": [-1, 1]}}},
        {"kept": {"w": {"0": [0, 10**9]}}},
        {"kept": {"w": {"0": [0, 999_999] * 99_999}}},
        {"refilled": {str(k): [2, 999_999, 0, 999_998] for k in range(99)}},
        {"kept": {"w": {str(axis): [0, 999_999] for axis in range(99_999)}}},
    ],
)
def test_what_is_no_recipe_is_refused(data: object) -> None:
    with pytest.raises(CheckpointError, match="recipe"):
        Recipe.from_json(data)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_rebuilds_the_narrowed_model_bit_for_bit(name: str) -> None:
    net, removal = narrowed(name)
    written = json.loads(json.dumps(Recipe().then(removal.attributes, removal.plan.kept).as_json()))
    state = removal.model.state_dict()
    fresh = FAMILIES[name]()
    apply_recipe(fresh, Recipe.from_json(written), state)
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh, net.images), logits(removal.model, net.images))
    for path, attributes in removal.attributes.items():
        assert {key: getattr(fresh.get_submodule(path), key) for key in attributes} == attributes


@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "densenet"])
def test_two_surgeries_compose_into_one_recipe(name: str) -> None:
    net, first = narrowed(name, 0.3)
    recipe = Recipe().then(first.attributes, first.plan.kept)
    again = Net(first.model, 32)
    second = again.remove_exactly(again.flags(0.3, 8))
    recipe = Recipe.from_json(recipe.then(second.attributes, second.plan.kept).as_json())
    state = second.model.state_dict()
    fresh = FAMILIES[name]()
    shapes = {key: tensor.shape for key, tensor in fresh.state_dict().items()}
    apply_recipe(fresh, recipe, state)
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh, net.images), logits(second.model, net.images))
    for key, axes in recipe.kept.items():
        for axis, index in axes.items():
            assert len(index) == state[key].shape[axis] < shapes[key][axis]
            assert index == sorted(set(index)) and index[-1] < shapes[key][axis]


def test_composed_indices_count_in_the_original() -> None:
    first = Recipe(kept={"w": {0: [1, 3, 5, 7]}}, attributes={"m": {"a": 4, "b": 2}})
    both = first.then({"m": {"a": 2}}, {"w": {0: [0, 3], 1: [2]}})
    assert both.kept == {"w": {0: [1, 7], 1: [2]}}
    assert both.attributes == {"m": {"a": 2, "b": 2}}
    assert first.kept == {"w": {0: [1, 3, 5, 7]}}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(attributes={"nowhere": {"out_channels": 1}}),
        Recipe(attributes={"0.0": {"out_channels": 9}}),
        Recipe(attributes={"0.0": {"out_channels": 0}}),
        Recipe(attributes={"0.0": {"out_channels": True}}),
        Recipe(attributes={"0.0": {"forward": 1}}),
        Recipe(attributes={"0.0": {"training": True}}),
        Recipe(attributes={"": {"feature_info": []}}),
        Recipe(kept={"nowhere.weight": {0: [0]}}),
        Recipe(kept={"0.0.bias": {0: [0]}}),
        Recipe(kept={"0.0.out_channels": {0: [0]}}),
    ],
)
def test_a_recipe_that_does_not_fit_the_network_is_refused(recipe: Recipe) -> None:
    model = residual_net()
    state = {**model.state_dict(), "0.0.bias": torch.zeros(8), "nowhere.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="recipe"):
        apply_recipe(model, recipe, state)


def test_a_replaced_stem_keeps_the_size_of_small_images() -> None:
    model = resnet()
    replace_stem(model)
    assert model.conv1.stride == (1, 1) and model.conv1.kernel_size == (3, 3)
    assert isinstance(model.maxpool, nn.Identity)
    net = Net(model, 16)
    removal = net.remove_exactly(net.flags(0.4, 2))
    assert removal.refused == []


def test_numbers_that_equal_a_width_by_chance_stay() -> None:
    class Ceiling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ceiling = 8  # no real activation gets there, so the proof could not notice

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clamp(max=self.ceiling)

    tail = nn.Sequential(nn.Upsample(size=8), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8, 5))
    removal = Net(nn.Sequential(conv_bn(3, 8), Ceiling(), tail)).remove_exactly({"0.0": [1, 2, 6]})
    assert removal.refused == []
    assert removal.plan.removed == {"0.0": [1, 2, 6]}
    assert (removal.model[1].ceiling, removal.model[2][0].size, removal.model[2][1].kernel_size) == (8, 8, 8)


def test_a_buffer_that_no_checkpoint_holds_is_cut_by_the_recipe() -> None:
    torch.manual_seed(0)
    net = Net(timm.create_model("resnetblur18", num_classes=5), 64)
    removal = net.remove_exactly({"layer2.0.conv1": [1, 4]})
    state = removal.model.state_dict()
    assert removal.plan.kept.keys() - state.keys()  # the blur kernel
    fresh = timm.create_model("resnetblur18", num_classes=5)
    recipe = Recipe(removal.attributes, removal.plan.kept)
    apply_recipe(fresh, Recipe.from_json(json.loads(json.dumps(recipe.as_json()))), state)
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(net.images), removal.model(net.images))


class Staged(nn.Module):
    """Levels that are no modules, as HRNet's; ``lies`` promises another width than it gives."""

    def __init__(self, lies: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 4)
        self.feature_info = [{"num_chs": 9 if lies else 8, "module": "stage1"}, {"num_chs": 12, "module": ""}]

    def forward_intermediates(self, x: Tensor, intermediates_only: bool = False) -> list[Tensor]:
        first = F.relu(self.bn1(self.conv1(x)))
        return [first, F.relu(self.bn2(self.conv2(first)))]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_intermediates(x)[-1].mean((2, 3)))


def test_levels_that_name_no_module_follow_what_the_network_gives() -> None:
    torch.manual_seed(0)
    net = Net(randomize_batch_norm(Staged(), seed=1), 12)
    removal = net.remove_exactly({"conv1": [1, 3], "conv2": [0, 5, 7]})
    assert [level["num_chs"] for level in removal.model.feature_info] == [6, 9]
    assert [level["num_chs"] for level in net.model.feature_info] == [8, 12]
    assert removal.attributes[""]["feature_info"] == removal.model.feature_info


def test_levels_that_were_no_truth_before_are_left_alone() -> None:
    torch.manual_seed(0)
    net = Net(randomize_batch_norm(Staged(lies=True), seed=1), 12)
    model = net.remove_exactly({"conv1": [1, 3], "conv2": [0, 5, 7]}).model
    assert next(level["num_chs"] for level in model.feature_info) == 9
