"""Weights tell which usual network they are of, by the names and sizes of their tensors alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bshub.errors import CheckpointError
from bshub.intake.build import build
from bshub.intake.fitting import fitting
from bshub.intake.loading import load_into
from bshub.intake.reference import parse_architecture


def state_of(reference: str, classes: int | None = None) -> dict[str, Tensor]:
    """Names and shapes of a network's tensors, without memory."""
    with torch.device("meta"):
        return build(parse_architecture(reference), classes)[0].state_dict()


@pytest.mark.parametrize(
    "reference",
    ["timm/resnet18", "timm/resnet50d", "timm/densenet121", "timm/mobilenetv3_small_050", "timm/vgg11_bn"]
    + ["timm/regnety_002", "timm/convnext_atto", "torchvision/vgg11_bn", "torchvision/squeezenet1_1"]
    + ["torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5", "torchvision/mnasnet0_5"],
)
def test_a_usual_network_is_named_with_its_classes(reference: str) -> None:
    state = state_of(reference, 7)
    assert fitting(state) == f"--arch {reference} --num-classes 7"
    assert fitting({name: value for name, value in state.items() if "num_batches" not in name}) == fitting(state)


def test_the_librarys_own_number_of_classes_and_the_small_stem_are_told() -> None:
    assert fitting(state_of("timm/resnet18")) == "--arch timm/resnet18"
    assert fitting(state_of("timm/resnet18?stem=cifar", 10)) == "--arch 'timm/resnet18?stem=cifar' --num-classes 10"


def test_densenets_of_both_libraries_are_the_same() -> None:
    assert fitting(state_of("torchvision/densenet121", 5)) == "--arch timm/densenet121 --num-classes 5"


def test_what_fits_nothing_is_not_named() -> None:
    state = state_of("timm/resnet18")
    assert fitting({}) is None
    assert fitting({name: value for name, value in state.items() if name != "bn1.weight"}) is None
    assert fitting({**state, "extra": torch.ones(1)}) is None
    assert fitting({**state, "layer1.0.conv1.weight": torch.empty(9, 64, 3, 3, device="meta")}) is None
    assert fitting({**state, "fc.weight": torch.empty(7, 99, device="meta")}) is None


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_the_message_names_it_behind_any_prefix(prefix: str) -> None:
    state = {prefix + name: value for name, value in state_of("timm/mobilenetv3_small_050", 3).items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(nn.Linear(2, 2), state, origin="m")
    fit = "--arch timm/mobilenetv3_small_050 --num-classes 3"
    assert caught.value.hint == f"the weights are those of another network: {fit}"
