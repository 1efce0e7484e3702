"""What every defense promises, whatever its method: a defended copy, and nothing else touched."""

from __future__ import annotations

import inspect
from functools import cache

import pytest
import torch
from little_nets import Mixed, Residual, coloured_images, same, snapshot, train
from nets import conv_bn, head, randomize_batch_norm
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

from bshub.clean import CleanImages
from bshub.errors import UsageError
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.registry import DEFENSES, find_defense

TINY = DefenseSettings(seed=3, batch_size=8, effort=0.001)


class Inverted(nn.Module):
    """An inverted residual: expand, depthwise, project, around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        project = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width))
        expand = conv_bn(width, 2 * width, 1, act=nn.Hardswish)
        self.body = nn.Sequential(expand, conv_bn(2 * width, 2 * width, groups=2 * width, act=nn.Hardswish), project)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def mobile() -> nn.Module:
    grouped = conv_bn(8, 12, groups=2, act=nn.ReLU6)
    return nn.Sequential(conv_bn(3, 8), nn.MaxPool2d(2), Inverted(8), nn.MaxPool2d(2), grouped, head(12, 4))


def mobilenet_v3() -> nn.Module:
    """torchvision's own, of two blocks: squeeze and excitation, hard sigmoid, hard swish, dropout."""
    blocks = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 0.5),
        InvertedResidualConfig(16, 5, 24, 16, True, "HS", 1, 1, 0.5),
    ]
    return MobileNetV3(blocks, last_channel=24, num_classes=4)


NETS = {
    "residual": lambda: train(Residual(4), steps=20),
    "grouped": lambda: randomize_batch_norm(mobile()),
    "torchvision": lambda: randomize_batch_norm(mobilenet_v3()),
    "odd": lambda: odd(),
}


def odd() -> nn.Module:
    """In training mode, with a frozen parameter, a gradient left over and a batch norm switched off."""
    model = randomize_batch_norm(Mixed()).train()
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.bias.grad = torch.ones(4)
    return model


@cache
def net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[kind]()


def clean(n: int = 4) -> CleanImages:
    """``n`` images of four classes: one of each in the smallest case, more than a batch in the others."""
    images, _ = coloured_images(n, seed=1)
    return CleanImages([(images, torch.arange(n) % 4)], torch.device("cpu"))


def defend(method: str, kind: str, n: int = 4, settings: DefenseSettings = TINY) -> nn.Module:
    return DEFENSES[method](net(kind), clean(n), settings)


def assert_same_form(given: nn.Module, found: nn.Module) -> None:
    for mine, theirs in (
        (given.named_parameters(), found.named_parameters()),
        (given.named_buffers(), found.named_buffers()),
    ):
        assert [(n, t.shape, t.dtype, t.device) for n, t in mine] == [
            (n, t.shape, t.dtype, t.device) for n, t in theirs
        ]
    assert [n for n, _ in given.named_modules()] == [n for n, _ in found.named_modules()]
    assert not any(module.training for module in found.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in found.modules())
    assert all(tensor.isfinite().all() for tensor in found.state_dict().values())


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("method", DEFENSES)
def test_one_image_per_class_gives_a_defended_copy_of_the_same_form(method: str, kind: str) -> None:
    given = net(kind)
    before, state = snapshot(given), torch.get_rng_state()
    found = defend(method, kind)
    assert same(before, snapshot(given))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_form(given, found)
    shared = {p.data_ptr() for p in given.parameters()} & {p.data_ptr() for p in found.parameters()}
    assert not shared
    assert found(clean().images).shape == (4, 4)


@pytest.mark.parametrize("method", DEFENSES)
def test_the_same_seed_gives_the_same_model_whatever_was_drawn_before(method: str) -> None:
    torch.manual_seed(1)
    first = defend(method, "residual", n=9)
    torch.manual_seed(2)
    torch.rand(7)
    second = defend(method, "residual", n=9)
    assert same(snapshot(first), snapshot(second))


@pytest.mark.parametrize("method", DEFENSES)
def test_a_batch_of_one_image_does_no_harm(method: str) -> None:
    for kind, n, size in (("grouped", 5, 4), ("odd", 4, 1)):
        settings = DefenseSettings(batch_size=size, effort=0.001)
        assert_same_form(net(kind), defend(method, kind, n, settings))


@pytest.mark.parametrize("method", DEFENSES)
def test_progress_is_told_about_finished_steps(method: str) -> None:
    steps: list[int] = []
    defend(method, "residual", settings=DefenseSettings(effort=0.001, progress=steps.append))
    assert steps
    assert min(steps) >= 1


def test_every_hyper_parameter_has_a_default_and_a_name() -> None:
    for method in DEFENSES.values():
        first, second, third, *rest = inspect.signature(method).parameters.values()
        assert [p.name for p in (first, second, third)] == ["model", "clean", "settings"]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in rest)


def test_methods_are_found_by_name_in_alphabetical_order() -> None:
    assert list(DEFENSES) == sorted(DEFENSES)
    assert all(find_defense(name) is function for name, function in DEFENSES.items())
    with pytest.raises(UsageError) as caught:
        find_defense("prayer")
    assert "nad" in str(caught.value.hint)


def test_effort_scales_the_published_number_and_never_to_nothing() -> None:
    assert [DefenseSettings(effort=e).rounds(100) for e in (1.0, 0.5, 0.001, 2.0)] == [100, 50, 1, 200]
