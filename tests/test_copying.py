"""Copies share what they may and nothing else."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from nets import conv_bn, head, randomize_batch_norm
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from bshub.copying import copy_sharing, named_tensors


class Odd(nn.Module):
    """Everything a module can hold beside its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(3, 4)
        self.twice = [self.body, self.body]  # in no registry
        self.table = {"widths": [4, 5], "deep": {"more": [1]}}
        self.scale = torch.ones(4)  # no buffer
        self.body.register_forward_hook(lambda module, args, output: output + 1)
        self.call = self.body.forward
        self.top = head(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.top(self.twice[1](x) * self.scale.view(1, -1, 1, 1))


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "odd": Odd(),
        "timm": timm.create_model("test_resnet"),
        "torchvision": torchvision.models.mobilenet_v3_small(weights=None),
        "parametrized": nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), head(4)),
    }


@pytest.mark.parametrize("name", ["odd", "timm", "torchvision", "parametrized"])
def test_the_copy_is_what_deepcopy_makes(name: str) -> None:
    model = randomize_batch_norm(models()[name])
    ours, theirs = copy_sharing(model, lambda name: False), copy.deepcopy(model).eval()
    assert [(n, type(m)) for n, m in ours.named_modules()] == [(n, type(m)) for n, m in theirs.named_modules()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(ours.modules(), theirs.modules(), strict=True))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    given = {id(tensor) for tensor in named_tensors(model).values()} | {id(module) for module in model.modules()}
    assert not given & {id(tensor) for tensor in named_tensors(ours).values()}
    assert not given & {id(module) for module in ours.modules()}


def test_what_two_places_share_stays_shared_and_apart_from_the_original() -> None:
    model = Odd()
    made = copy_sharing(model, lambda name: False)
    assert made.twice[0] is made.twice[1] is made.body is not model.body
    assert made.call.__self__ is made.body
    made.table["widths"].append(6)
    made.table["deep"]["more"].append(2)
    made.scale.zero_()
    made.body._forward_hooks.clear()
    assert model.table == {"widths": [4, 5], "deep": {"more": [1]}}
    assert model.scale.sum() == 4 and len(model.body._forward_hooks) == 1


def test_a_tensor_is_shared_only_if_all_its_names_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    made = copy_sharing(model, lambda name: name != "1.weight")
    assert made[0].weight is made[1].weight is not model[0].weight
    assert made[0].bias is model[0].bias and made[2].running_mean is model[2].running_mean
    assert model.training and not made.training
