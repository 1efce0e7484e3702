"""Weights that fit another network than the one that was named → the name that fits them, where it is a usual one.

A network is told by the names and shapes of its tensors. Candidates are built without memory (torch's ``meta`` device),
and only those of the family whose mark the weights carry: some fifty milliseconds each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bshub.errors import BshubError
from bshub.intake.build import build
from bshub.intake.reference import parse_architecture

# a tensor that every network of a family has → library and names; where both libraries fit, timm's comes first
_FAMILIES: tuple[tuple[str, str, str], ...] = (
    (
        "layer1.0.conv1.weight",
        "timm",
        "resnet18 resnet34 resnet26 resnet50 resnet101 resnet152 wide_resnet50_2 wide_resnet101_2 resnext50_32x4d "
        "resnext101_32x8d seresnet50 resnet18d resnet26d resnet34d resnet50d resnet101d",
    ),
    ("features.conv0.weight", "timm", "densenet121 densenet169 densenet201 densenet161"),
    (
        "conv_stem.weight",
        "timm",
        "mobilenetv2_100 mobilenetv2_050 mobilenetv2_140 mobilenetv3_large_100 mobilenetv3_small_100 "
        "mobilenetv3_small_075 mobilenetv3_small_050 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 "
        "efficientnet_b4 efficientnet_b5 efficientnet_lite0 efficientnetv2_rw_s mnasnet_100 ghostnet_100 fbnetc_100",
    ),
    (
        "features.0.weight",
        "torchvision",
        "vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn alexnet squeezenet1_0 squeezenet1_1",
    ),
    ("pre_logits.fc1.weight", "timm", "vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn"),
    (
        "features.0.0.weight",
        "torchvision",
        "mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_b1 efficientnet_b2 "
        "efficientnet_b3 efficientnet_b4 efficientnet_v2_s convnext_tiny convnext_small convnext_base",
    ),
    ("stages.0.blocks.0.conv_dw.weight", "timm", "convnext_tiny convnext_small convnext_base convnext_atto"),
    (
        "s1.b1.conv1.conv.weight",
        "timm",
        "regnetx_002 regnetx_004 regnetx_006 regnetx_008 regnetx_016 regnetx_032 regnety_002 regnety_004 regnety_006 "
        "regnety_008 regnety_016 regnety_032",
    ),
    ("stage2.0.branch1.0.weight", "torchvision", "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5"),
    ("layers.0.weight", "torchvision", "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3"),
    ("Conv2d_1a_3x3.conv.weight", "timm", "inception_v3"),
)
_CIFAR = "?stem=cifar"
_COUNTER = ".num_batches_tracked"


def fitting(state: Mapping[str, Tensor]) -> str | None:
    """The options that name the network of a state dict: ``--arch timm/resnet50 --num-classes 10``.

    Args:
        state: Admitted weights, without the prefixes of wrappers.

    Returns:
        The options; None where no usual network fits.
    """
    shapes = {name: tuple(value.shape) for name, value in state.items() if not name.endswith(_COUNTER)}
    for mark, library, names in _FAMILIES:
        if mark in shapes:
            for name in names.split():
                options = _options(f"{library}/{name}", shapes)
                if options is not None:
                    return options
    return None


def _options(reference: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    try:
        with torch.device("meta"):
            module, _, _ = build(parse_architecture(reference), None)
    except BshubError:  # one of another version of the library, or one that computes with its own weights
        return None
    own = {name: tuple(value.shape) for name, value in module.state_dict().items() if not name.endswith(_COUNTER)}
    if own.keys() != shapes.keys():
        return None
    head, stem = _last(module, nn.Linear | nn.Conv2d), next(iter(own))
    differing = {name for name in own if own[name] != shapes[name]}
    classes, stock = shapes[f"{head}.weight"][0], own[f"{head}.weight"][0]
    if any(shapes[name] != (classes, *own[name][1:]) for name in differing if name.startswith(f"{head}.")):
        return None
    rest = {name for name in differing if not name.startswith(f"{head}.")}
    cifar = rest == {stem} and shapes[stem] == (*own[stem][:2], 3, 3)
    if rest and not cifar:
        return None
    arch = f"'{reference}{_CIFAR}'" if cifar else reference
    return f"--arch {arch}" + (f" --num-classes {classes}" if classes != stock else "")


def _last(module: nn.Module, kinds: object) -> str:
    """Name of the last layer of some kinds, which in every family above gives the logits."""
    return [name for name, child in module.named_modules() if isinstance(child, kinds)][-1]  # type: ignore[arg-type]
