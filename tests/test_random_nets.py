"""Random small networks, random flags: surgery is exact each time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import Apply, Concat, Gate, Halves, Net, Residual, Shuffle, conv_bn, head, parameters
from torch import nn

Step = tuple[nn.Module, int]  # a layer and the width it returns
Draw = Callable[[st.SearchStrategy], object]
ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.Hardswish)
WIDTHS = (4, 6, 8, 12)


def plain(draw: Draw, width: int) -> Step:
    out = draw(st.sampled_from(WIDTHS))
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if width % g == 0 and out % g == 0]))
    kernel, act, bias = draw(st.sampled_from((1, 3))), draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans())
    return conv_bn(width, out, kernel, groups=groups, act=act, bias=bias), out


def depthwise(draw: Draw, width: int) -> Step:
    multiplier = draw(st.sampled_from((1, 2)))
    act = draw(st.sampled_from((*ACTIVATIONS, nn.Identity)))
    return conv_bn(width, width * multiplier, groups=width, act=act), width * multiplier


def pointwise_without_norm(draw: Draw, width: int) -> Step:
    out = draw(st.sampled_from(WIDTHS))
    return nn.Sequential(nn.Conv2d(width, out, 1), nn.ReLU()), out


def transposed(draw: Draw, width: int) -> Step:
    out = draw(st.sampled_from(WIDTHS))
    groups = draw(st.sampled_from([g for g in (1, 2) if out % g == 0 and width % g == 0]))
    conv = nn.ConvTranspose2d(width, out, 3, padding=1, groups=groups)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()), out


def residual(draw: Draw, width: int) -> Step:
    first, middle = draw(st.sampled_from((plain, depthwise)))(draw, width)
    body = nn.Sequential(first, nn.Conv2d(middle, width, 1), nn.BatchNorm2d(width))
    return Residual(body, draw(st.sampled_from((*ACTIVATIONS, nn.Identity)))), width


def concat(draw: Draw, width: int) -> Step:
    branches = [plain(draw, width) for _ in range(2)]
    if draw(st.booleans()):
        branches.append((nn.Identity(), width))
    out = sum(size for _, size in branches)
    return nn.Sequential(Concat(*(branch for branch, _ in branches)), nn.BatchNorm2d(out), nn.ReLU()), out


def gate(draw: Draw, width: int) -> Step:
    return Gate(width, 3, draw(st.sampled_from((nn.Sigmoid, nn.Hardsigmoid)))), width


def shuffle(draw: Draw, width: int) -> Step:
    return Shuffle(draw(st.sampled_from([g for g in (1, 2) if width % g == 0]))), width


def halves(draw: Draw, width: int) -> Step:
    if width % 2:
        return nn.Identity(), width
    body, out = plain(draw, width // 2) if width // 2 in WIDTHS else depthwise(draw, width // 2)
    return Halves(body), width // 2 + out


def pool(draw: Draw, width: int) -> Step:
    kind = draw(st.sampled_from((nn.MaxPool2d, nn.AvgPool2d)))
    return kind(3, 1, 1), width


def affine(draw: Draw, width: int) -> Step:
    shift = draw(st.sampled_from((0.0, 0.5)))
    return Apply(lambda x: 2 * x + shift), width


STEPS = (plain, depthwise, pointwise_without_norm, transposed, residual, concat, gate, shuffle, halves, pool, affine)


@st.composite
def networks(draw: Draw) -> nn.Module:
    width = draw(st.sampled_from(WIDTHS))
    layers = [conv_bn(3, width, act=draw(st.sampled_from(ACTIVATIONS)))]
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=5)):
        layer, width = step(draw, width)
        layers.append(layer)
    flat = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(width * 9, 5))
    return nn.Sequential(*layers, flat if draw(st.booleans()) else head(width))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(networks(), st.sampled_from((0.05, 0.2, 0.5, 0.9)), st.integers(0, 5), st.booleans())
def test_surgery_on_a_random_net_is_exact_and_never_grows_it(
    model: nn.Module, fraction: float, seed: int, by_layer: bool
) -> None:
    torch.manual_seed(seed)
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    net = Net(model, size=6)
    flagged = net.flags(fraction, seed)
    if by_layer:  # whole layers go, the others stay
        flagged = {name: index for k, (name, index) in enumerate(net.flags(1.0).items()) if (k + seed) % 3 == 0}
    removal = net.remove_exactly(flagged)
    assert removal.refused == []
    assert parameters(removal.model) <= parameters(model)
