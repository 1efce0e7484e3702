"""22 to 25: networks."""

from __future__ import annotations

import torch
from nets import Net, conv_bn, head
from torch import Tensor, nn

import bshub
from bad.bench import Bench, Case, Outcome
from bshub.errors import TraceError

IMAGES = [(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4)]


class Branching(nn.Module):
    """Decides by what it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.mean() > 0 else x


class Sorting(nn.Module):
    """An operation without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1).values


class Twice(nn.Module):
    """One convolution and one batch norm, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm, self.head = conv_bn(3, 8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x))).relu()
        return self.head(self.norm(self.conv(x)).relu())


def control_flow(bench: Bench) -> Outcome:
    model = nn.Sequential(conv_bn(3, 8), Branching(), conv_bn(8, 8), head(8)).eval()
    return bench.call(bshub.sanitize, model, IMAGES)


def unknown_operation(bench: Bench) -> Outcome:
    torch.manual_seed(0)
    net = Net(nn.Sequential(conv_bn(3, 8), conv_bn(8, 8), Sorting(), conv_bn(8, 6), head(6)))
    removal = net.remove_exactly({"0.0": [1], "1.0": [2, 5], "3.0": [4]})
    assert removal.plan.removed == {"0.0": [1], "3.0": [4]}
    assert removal.plan.silenced == {"1.0": [2, 5]}
    return Outcome(None, 0, str(removal.plan.stays))


def used_twice(bench: Bench) -> Outcome:
    torch.manual_seed(0)
    removal = Net(Twice()).remove_exactly({"stem.0": [0], "conv": [1, 6]})
    return Outcome(None, 0, str(removal.plan.counts()))


def whole_group(bench: Bench) -> Outcome:
    torch.manual_seed(0)
    removal = Net(nn.Sequential(conv_bn(3, 8), conv_bn(8, 12), head(12))).remove_exactly({"0.0": range(8)})
    assert removal.model[0][0].out_channels == 1
    return Outcome(None, 0, str(removal.plan.silenced))


CASES = [
    Case(22, "control flow", control_flow, TraceError, "in module '1' (graphs.py, line ", 2),
    Case(23, "unknown operation", unknown_operation, says="sort"),
    Case(24, "conv and batch norm used twice", used_twice, says="'flagged': 3"),
    Case(25, "a whole group selected", whole_group, says="{'0.0': [0]}"),
]
