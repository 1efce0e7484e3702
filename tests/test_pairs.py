"""find_pairs: which batch norm normalises which filter, from the data flow."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torchvision
from nets import Apply, Auxiliary, Concat, Net, Residual, conv_bn, head, residual_net
from torch import Tensor, nn

from bshub.graph.pairs import ConvBN

LEAVES = ("weight", "bias")


class LyingOrder(nn.Module):
    """Registers its layers in an order that has nothing to do with how they run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_b, self.conv_a = nn.BatchNorm2d(8), nn.Conv2d(3, 8, 3, padding=1)
        self.norm_a, self.head = nn.BatchNorm2d(8), head(8)
        self.conv_c, self.norm_c = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv_b = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_a(self.conv_a(x)).relu()
        x = self.norm_c(self.conv_b(x)).relu()
        return self.head(self.norm_b(self.conv_c(x)).relu())


class PreActivation(nn.Module):
    """``x + conv2(relu(bn2(conv1(relu(bn1(x))))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 6, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class TwoReaders(nn.Module):
    """One convolution read by two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(self.one(x).relu() + nn.functional.silu(self.two(x)))


class Twice(nn.Module):
    """One convolution run twice, each time before a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1), head(8)
        self.one, self.two = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.conv(self.stem(x))).relu()
        return self.head(self.two(self.conv(x)).relu())


def found(model: nn.Module, size: int = 16) -> tuple[Net, dict[str, ConvBN]]:
    torch.manual_seed(0)
    net = Net(model, size)
    return net, {pair.name: pair for pair in net.pairing.pairs}


def norms(pair: ConvBN) -> list[str]:
    return [str(reader.norm.weight).removesuffix(".weight") for reader in pair.readers]


def test_pairs_follow_the_run_when_the_registration_order_lies() -> None:
    net, pairs = found(LyingOrder())
    assert {name: norms(pair) for name, pair in pairs.items()} == {
        "conv_a": ["norm_a"],
        "conv_b": ["norm_c"],
        "conv_c": ["norm_b"],
    }
    assert list(pairs) == ["conv_a", "conv_b", "conv_c"]  # execution order
    assert net.pairing.filters == 24
    net.remove_exactly({"conv_a": [0], "conv_b": [1, 2], "conv_c": [7]})


def test_a_pre_activation_block_pairs_only_where_the_channel_belongs_to_one_filter() -> None:
    net, pairs = found(
        nn.Sequential(nn.Conv2d(3, 8, 3), PreActivation(8), PreActivation(8), nn.BatchNorm2d(8), nn.ReLU(), head(8))
    )
    assert {name: norms(pair) for name, pair in pairs.items()} == {
        "0": ["1.bn1"],
        "1.conv1": ["1.bn2"],
        "2.conv1": ["2.bn2"],
    }
    assert set(net.pairing.unpaired) == {"1.conv2", "2.conv2"}  # what they write is a sum
    assert all(net.pairing.unpaired.values())
    net.remove_exactly(net.flags(0.4))


def test_in_a_densenet_each_growth_filter_is_read_by_every_later_norm() -> None:
    model = torchvision.models.DenseNet(growth_rate=4, block_config=(3, 2), num_init_features=8, num_classes=5)
    net, pairs = found(model, 32)
    block = "features.denseblock1"
    first = pairs[f"{block}.denselayer1.conv2"]
    assert norms(first) == [f"{block}.denselayer2.norm1", f"{block}.denselayer3.norm1", "features.transition1.norm"]
    assert [reader.channels.tolist() for reader in first.readers] == [[8, 9, 10, 11]] * 3
    assert norms(pairs[f"{block}.denselayer1.conv1"]) == [f"{block}.denselayer1.norm2"]
    # the stem passes its own norm, so what the block reads is no filter any more
    assert norms(pairs["features.conv0"]) == ["features.norm0"]
    assert net.pairing.unpaired == {}


def test_a_convolution_read_by_two_norms_has_two_readers_with_their_activations() -> None:
    net, pairs = found(TwoReaders())
    assert norms(pairs["conv"]) == ["one", "two"]
    assert [reader.activation and reader.activation[0] for reader in pairs["conv"].readers] == ["relu", "silu"]
    removal = net.remove_exactly({"conv": [2, 5]})
    assert removal.plan.removed == {"conv": [2, 5]}


def test_a_norm_over_a_concatenation_is_read_by_each_branch_at_its_place() -> None:
    branches = Concat(nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1), nn.Identity())
    net, pairs = found(nn.Sequential(conv_bn(3, 8), branches, nn.BatchNorm2d(18), nn.ReLU(), head(18)))
    one, two = pairs["1.branches.0"], pairs["1.branches.1"]
    assert (norms(one), one.readers[0].channels.tolist()) == (["2"], [0, 1, 2, 3])
    assert (norms(two), two.readers[0].channels.tolist()) == (["2"], [4, 5, 6, 7, 8, 9])
    assert two.readers[0].filters.tolist() == [0, 1, 2, 3, 4, 5]
    assert norms(pairs["0.0"]) == ["0.1"]
    removal = net.remove_exactly({"1.branches.0": [1], "1.branches.1": [0, 5]})
    assert removal.plan.kept["2.weight"][0] == [0, *range(2, 4), *range(5, 9), *range(10, 18)]


def test_a_convolution_used_twice_is_one_pair_with_two_runs() -> None:
    net, pairs = found(Twice())
    assert norms(pairs["conv"]) == ["one", "two"]
    assert pairs["conv"].values.shape == (2, 8)
    assert pairs["conv"].paired.all()
    removal = net.remove_exactly({"conv": [1, 4], "stem.0": [1, 4]})
    assert removal.plan.removed == {"stem.0": [1, 4], "conv": [1, 4]}
    assert removal.model.conv.weight.shape == (6, 6, 3, 3)


def test_a_convolution_used_twice_is_silenced_in_both_runs_while_the_stem_lives() -> None:
    net, _ = found(Twice())
    removal = net.remove_exactly({"conv": [1, 4]})
    assert removal.plan.silenced == {"conv": [1, 4]}
    assert set(removal.plan.zeroed) == {f"{module}.{leaf}" for module in ("conv", "one", "two") for leaf in LEAVES}


def test_part_of_a_convolution_can_have_a_norm() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(4), head(8)

        def forward(self, x: Tensor) -> Tensor:
            plain, normed = self.conv(x).chunk(2, 1)
            return self.head(torch.cat([plain, self.norm(normed)], 1).relu())

    net, pairs = found(Half())
    assert pairs["conv"].paired.tolist() == [False] * 4 + [True] * 4
    assert pairs["conv"].readers[0].filters.tolist() == [4, 5, 6, 7]
    assert net.pairing.filters == 4


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.LeakyReLU])
def test_the_activation_after_the_norm_is_recorded(act: type[nn.Module]) -> None:
    _, pairs = found(nn.Sequential(conv_bn(3, 8, act=act), head(8)))
    activation = pairs["0.0"].readers[0].activation
    assert activation is not None
    x = torch.linspace(-7, 7, 101)
    operation = getattr(torch.ops.aten, activation[0])
    assert torch.allclose(operation(x, *activation[1]), act()(x), atol=1e-6)


def test_a_norm_without_activation_says_so() -> None:
    _, pairs = found(residual_net())
    assert pairs["1.body.1"].readers[0].activation is None


def test_a_norm_of_numbers_fused_in_a_custom_layer_is_found() -> None:
    _, pairs = found(timm.create_model("test_resnet"), 32)  # BatchNormAct2d and plain ones
    assert len(pairs) == sum(isinstance(m, nn.BatchNorm2d) for m in timm.create_model("test_resnet").modules())


def test_a_convolution_without_a_norm_gives_its_reason() -> None:
    net, pairs = found(nn.Sequential(conv_bn(3, 8), nn.Conv2d(8, 6, 3), nn.ReLU(), head(6)))
    assert list(pairs) == ["0.0"]
    assert net.pairing.unpaired == {"1": "no batch norm reads its filters directly"}


def test_weights_made_on_the_way_are_no_filters() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    net, pairs = found(nn.Sequential(Standardised(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv_bn(8, 6), head(6)))
    assert list(pairs) == ["3.0"]
    assert "computed on the way" in net.pairing.unpaired["0"]


def test_a_convolution_that_runs_in_training_only_is_not_scored() -> None:
    net, pairs = found(Auxiliary())
    assert sorted(pairs) == ["body.0", "stem.0"]
    assert list(net.pairing.unpaired) == ["aux.0.0"]


def test_every_filter_of_a_residual_net_is_paired_once() -> None:
    net, pairs = found(nn.Sequential(conv_bn(3, 8), Residual(conv_bn(8, 8)), Apply(torch.relu), head(8)))
    assert all(pair.paired.all() and len(pair.readers) == 1 for pair in pairs.values())
    assert net.pairing.filters == 16
    assert np.unique(np.concatenate([pair.values.ravel() for pair in pairs.values()])).size == 16
