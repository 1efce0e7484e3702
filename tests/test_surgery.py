"""remove: the narrowed model computes what the masked original computes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
import torchvision
from nets import (
    Apply,
    Auxiliary,
    Concat,
    Gate,
    Halves,
    Net,
    Residual,
    Shuffle,
    conv_bn,
    head,
    logits,
    parameters,
    relative_error,
    residual_net,
    silenced_by_hand,
    vgg_like,
)
from torch import nn

from bshub.graph.coupling import follow_channels
from bshub.surgery.remove import silence


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5)


def resnet() -> nn.Module:
    return timm.create_model("resnet18", channels=(8, 16, 24, 32), num_classes=5)


def regnet_block() -> nn.Module:
    body = nn.Sequential(
        conv_bn(16, 16, 1), conv_bn(16, 16, groups=4), Gate(16, 4), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
    )
    return nn.Sequential(conv_bn(3, 16), Residual(body), head(16))


def transposed(outputs: int = 6, groups: int = 1) -> nn.Module:
    up = nn.Sequential(nn.ConvTranspose2d(8, outputs, 2, 2, groups=groups), nn.BatchNorm2d(outputs), nn.ReLU())
    return nn.Sequential(conv_bn(3, 8), up, conv_bn(outputs, 6), head(6))


def depthwise_multiplier() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8), conv_bn(8, 16, groups=8), conv_bn(16, 8, 1), conv_bn(8, 24, groups=8, act=nn.SiLU), head(24)
    )


def gates() -> nn.Module:
    first, second = conv_bn(3, 8, act=nn.SiLU), conv_bn(8, 8, groups=8, act=nn.Hardswish)
    return nn.Sequential(
        first, Gate(8, 4), second, Gate(8, 2, nn.Hardsigmoid), conv_bn(8, 12, 1, act=nn.Identity), head(12)
    )


def shuffled_groups() -> nn.Module:
    pointwise = conv_bn(12, 12, 1, groups=3), conv_bn(12, 12, 1, groups=3)
    return nn.Sequential(conv_bn(3, 12), pointwise[0], Shuffle(3), conv_bn(12, 12, groups=12), pointwise[1], head(12))


def concat() -> nn.Module:
    branches = Concat(conv_bn(8, 4, 1), nn.Conv2d(8, 6, 3, padding=1), nn.Identity())
    return nn.Sequential(conv_bn(3, 8), branches, nn.BatchNorm2d(18), nn.ReLU(), conv_bn(18, 8), head(8))


def halves() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8), Halves(conv_bn(4, 6)), conv_bn(10, 8), head(8))


SMALL: dict[str, Callable[[], nn.Module]] = {
    "residual": residual_net,
    "vgg": vgg_like,
    "regnet block": regnet_block,
    "depthwise multiplier": depthwise_multiplier,
    "gates": gates,
    "shuffled groups": shuffled_groups,
    "concat": concat,
    "halves": halves,
    "auxiliary": Auxiliary,
    "transposed": transposed,
    "transposed, more outputs": lambda: transposed(12),
    "transposed groups": lambda: transposed(8, 2),
    "transposed depthwise": lambda: transposed(8, 8),
}
LIBRARY: dict[str, Callable[[], nn.Module]] = {
    "test_resnet": lambda: timm.create_model("test_resnet", num_classes=5),
    "resnet": resnet,
    "densenet": densenet,
    "timm densenet": lambda: timm.create_model("densenet121", growth_rate=4, block_config=(2, 2), num_classes=5),
    "mobilenetv2": lambda: torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=5),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5),
}
SUMS = ("residual", "vgg", "test_resnet", "resnet")  # every path keeps a zero a zero


def build(name: str) -> Net:
    torch.manual_seed(0)
    return Net(SMALL[name](), 16) if name in SMALL else Net(LIBRARY[name](), 32)


@pytest.fixture(scope="module", params=[*SMALL, *LIBRARY])
def family(request: pytest.FixtureRequest) -> tuple[str, Net]:
    return request.param, build(request.param)


@pytest.mark.parametrize(("fraction", "seed"), [(0.05, 0), (0.2, 1), (0.4, 2), (0.6, 3)])
def test_narrowed_equals_masked(family: tuple[str, Net], fraction: float, seed: int) -> None:
    name, net = family
    flagged = net.flags(fraction, seed)
    removal = net.remove_exactly(flagged)
    assert removal.refused == []
    assert removal.proof.holds
    if removal.plan.removed:
        assert parameters(removal.model) < parameters(net.model)
    if sum(map(len, flagged.values())):  # the comparison could have failed
        assert relative_error(removal.model, net.model, net.images) > 1e-3
    if name in SUMS:  # removal is then the paper's pruning, nothing else
        assert relative_error(removal.model, silenced_by_hand(net, flagged), net.images) < 1e-5


def test_the_librarys_mask_is_the_oracles(family: tuple[str, Net]) -> None:
    _, net = family
    removal = net.remove_exactly(net.flags(0.3, 5))
    assert relative_error(removal.model, silence(net.model, removal.plan), net.images) < 1e-5


def test_all_but_one_filter_of_each_layer(family: tuple[str, Net]) -> None:
    _, net = family
    flagged = {pair.name: np.flatnonzero(pair.paired)[1:] for pair in net.pairing.pairs}
    assert net.remove_exactly(flagged).refused == []


def test_every_layer_flagged_whole_keeps_one_slot_of_each_group_axis(family: tuple[str, Net]) -> None:
    _, net = family
    removal = net.remove_exactly(net.flags(1.0))
    assert all(kept for axes in removal.plan.kept.values() for kept in axes.values())
    assert all(parameter.numel() for parameter in removal.model.parameters())


def test_the_narrowed_model_trains_one_step(family: tuple[str, Net]) -> None:
    _, net = family
    model = net.remove_exactly(net.flags(0.5, 4)).model.train()
    answers = model(net.images)
    answers = answers if isinstance(answers, tuple) else (answers,)
    loss = sum(nn.functional.cross_entropy(answer, torch.arange(len(net.images))) for answer in answers)
    loss.backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert logits(model, net.images).isfinite().all()


def test_an_auxiliary_head_shrinks_with_the_trunk_it_reads() -> None:
    model = build("auxiliary").remove_exactly({"stem.0": [0, 3, 4]}).model
    assert model.aux[0][0].in_channels == 9
    main, aux = model.train()(torch.randn(2, 3, 16, 16))
    assert main.shape == aux.shape == (2, 5)


def test_a_slot_of_a_sum_is_silenced_until_all_its_writers_are_flagged() -> None:
    net = build("residual")
    one = net.remove_exactly({"1.body.1": [2, 5]})
    assert (one.plan.removed, one.plan.silenced) == ({}, {"1.body.1": [2, 5]})
    assert one.plan.stays == {"1.body.1": "another branch writes or reads the same channel"}
    assert parameters(one.model) == parameters(net.model)
    writers = {name: [2, 5] for name in ("0.0", "1.body.1", "2.body.1")}
    every = net.remove_exactly(writers)
    assert (every.plan.removed, every.plan.silenced) == (writers, {})
    assert every.model[3][2].in_features == 6


def test_a_layer_flagged_whole_keeps_its_first_slot_as_zeros() -> None:
    removal = build("vgg").remove_exactly({"2.0": range(12)})
    assert removal.plan.silenced == {"2.0": [0]}
    assert removal.plan.removed == {"2.0": list(range(1, 12))}
    assert removal.model[2][0].out_channels == 1


def test_a_depthwise_chain_leaves_with_its_flagged_filter() -> None:
    net = build("mobilenetv2")
    removal = net.remove_exactly({"features.2.conv.1.0": [3]})
    assert removal.plan.removed == {"features.2.conv.1.0": [3]}
    assert removal.plan.followers == {"features.2.conv.0.0": [3]}


def test_nothing_flagged_changes_nothing() -> None:
    net = build("residual")
    removal = net.remove_exactly({"0.0": []})
    assert removal.plan.counts() == {"flagged": 0, "removed": 0, "silenced": 0, "followers": 0}
    assert removal.attributes == {}
    assert torch.equal(logits(removal.model, net.images), logits(net.model, net.images))


def test_indices_after_surgery_address_the_silenced_filters() -> None:
    net = build("residual")
    slots = {name: [0, 1, 4] for name in ("0.0", "1.body.1", "2.body.1")}
    removal = net.remove_exactly({**slots, "1.body.1": [0, 1, 4, 6], "2.body.1": [0, 1, 4, 2, 7]})
    after = removal.plan.zeroed_after()
    assert removal.plan.silenced == {"1.body.1": [6], "2.body.1": [2, 7]}
    assert after["1.body.1.weight"] == after["1.body.2.weight"] == [3]  # 2 3 5 6 7 stay
    assert after["2.body.1.weight"] == after["2.body.2.bias"] == [0, 4]
    tensors = dict(removal.model.named_parameters())
    for name in tensors.keys() & after.keys():
        assert not tensors[name][after[name]].any(), name
        others = np.setdiff1d(np.arange(len(tensors[name])), after[name])
        assert tensors[name][others].flatten(1).any(1).all() if tensors[name].dim() > 1 else tensors[name][others].all()


@pytest.mark.parametrize(
    ("function", "flagged"),
    [
        (lambda x: x.reshape(len(x), 8, *x.shape[2:]), [1]),
        (lambda x: x.reshape(len(x), 8, *x.shape[2:]), [0, 2, 5, 6]),
        (lambda x: x.reshape(len(x), 8, *x.shape[2:]), range(8)),  # one slot was kept as the last, then all must be
        (lambda x: x.reshape(-1, 8, *x.shape[2:]), [0, 2, 5, 6]),  # runs, on half as many images
        (lambda x: x.view(len(x), 4, 2, *x.shape[2:]).flatten(1, 2), [0, 2, 4, 6]),
        (lambda x: x.view(len(x), 4, 2, *x.shape[2:]).flatten(1, 2), range(8)),
    ],
)
def test_a_width_in_code_keeps_its_groups_and_the_rest_leaves(function: object, flagged: list[int]) -> None:
    torch.manual_seed(0)
    net = Net(nn.Sequential(conv_bn(3, 8), conv_bn(8, 8), Apply(function), conv_bn(8, 6), head(6)))
    removal = net.remove_exactly({"0.0": [1, 3], "1.0": flagged, "3.0": [0, 4]})
    assert removal.plan.silenced == {"1.0": list(flagged)}
    assert removal.plan.removed == {"0.0": [1, 3], "3.0": [0, 4]}
    assert len(removal.refused) == 1


def test_two_widths_in_code_are_both_found() -> None:
    torch.manual_seed(0)
    fixed = Apply(lambda x: x.reshape(len(x), 8, *x.shape[2:]))
    net = Net(nn.Sequential(conv_bn(3, 8), fixed, conv_bn(8, 6), conv_bn(6, 8), fixed, conv_bn(8, 6), head(6)))
    removal = net.remove_exactly({"0.0": [1], "2.0": [2, 3], "3.0": [4, 5], "5.0": [0]})
    assert removal.plan.silenced == {"0.0": [1], "3.0": [4, 5]}
    assert removal.plan.removed == {"2.0": [2, 3], "5.0": [0]}
    assert removal.refused


@pytest.mark.parametrize("outputs", [6, 8, 12])
def test_a_transposed_convolution_is_silenced_at_its_outputs(outputs: int) -> None:
    torch.manual_seed(0)
    up = nn.Sequential(nn.ConvTranspose2d(8, outputs, 3, padding=1), nn.BatchNorm2d(outputs))
    block = nn.Sequential(conv_bn(3, outputs), Residual(nn.Sequential(conv_bn(outputs, 8), up)), head(outputs))
    removal = Net(block).remove_exactly({"1.body.1.0": [0, outputs - 1]})
    assert removal.plan.silenced == {"1.body.1.0": [0, outputs - 1]}


def test_shuffles_of_different_groups_are_exact_even_where_the_code_no_longer_divides() -> None:
    net = Net(nn.Sequential(conv_bn(3, 6), Shuffle(2), Shuffle(3), conv_bn(6, 4), head(4)))
    for flagged in ([0, 3], [0, 1, 3, 4], range(6)):
        net.remove_exactly({"0.0": flagged, "3.0": [1]})


def test_a_copy_into_another_tensor_travels_with_its_source() -> None:
    torch.manual_seed(0)
    copied = Apply(lambda x: torch.zeros_like(x).copy_(x))
    Net(nn.Sequential(conv_bn(3, 8), copied, head(8))).remove_exactly({"0.0": [2, 3]})


def test_a_copy_over_live_channels_is_exact() -> None:
    class Over(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = conv_bn(3, 8), conv_bn(3, 8), head(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.a(x).clone().copy_(self.b(x)))

    for flagged in ([0, 5], range(8)):
        Net(Over()).remove_exactly({"a.0": flagged, "b.0": [1, 5]})


def test_tied_weights_are_exact_and_stay_tied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8), head(8))
    model[2][0].weight = model[1][0].weight
    removal = Net(model).remove_exactly({"0.0": [2, 6], "1.0": [2, 6]})
    assert removal.model[2][0].weight is removal.model[1][0].weight


def test_the_narrowed_model_can_be_followed_again() -> None:
    model = (net := build("resnet")).remove_exactly(net.flags(0.5, 1)).model
    flow, _ = follow_channels(copy.deepcopy(model), net.size)
    assert all(len(axes[0]) == len(model.state_dict()[name]) for name, axes in flow.channels.axes.items() if axes)
    again = Net(model, 32)
    again.remove_exactly(again.flags(0.4, 2))
