"""What the masking defenses share: masks over named tensors, random batches, pruning by clean accuracy.

A mask ``m`` never enters a module. The network runs as ``f(x; θ')`` with ``θ'[name] = θ[name] · m`` handed to
``torch.func.functional_call``, so any network with such parameters will do and its module tree stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bshub.augment import augment
from bshub.clean import CleanImages
from bshub.errors import InconclusiveError
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.metrics import clean_accuracy

THRESHOLDS = tuple(step / 20 for step in range(18, -1, -1))  # 0.9, 0.85 … 0


def scaled_norms(model: nn.Module) -> list[str]:
    """Names of the batch norms with a scale γ.

    Raises:
        InconclusiveError: There is none.
    """
    parameters = dict(model.named_parameters())
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and f"{name}.weight" in parameters
    ]
    if not names:
        raise InconclusiveError("the model has no batch norm whose channels could be masked", hint="try --method awm")
    return names


def conv_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the 2-d convolutions: parameter name → ``(out, in/groups, kh, kw)``, not copied.

    Raises:
        InconclusiveError: There is none.
    """
    parameters = dict(model.named_parameters())
    weights: dict[str, Tensor] = {
        f"{name}.weight": parameters[f"{name}.weight"]
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and f"{name}.weight" in parameters
    }
    if not weights:
        raise InconclusiveError(
            "the model has no convolution with weights of its own",
            hint="choose another --method: bshub sanitize --help lists them",
        )
    return weights


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The classifier's answer ``[n, classes]`` with some of its parameters or buffers exchanged."""
    answer = torch.func.functional_call(model, dict(tensors), (images,))
    return answer if isinstance(answer, Tensor) else answer[0]


def random_batches(
    clean: CleanImages, settings: DefenseSettings, generator: torch.Generator, *, augmented: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches without end, no image twice in one: ``(images [n, c, h, w], labels [n])``, n ≥ 2."""
    clean.drain()
    images, labels = clean.images, clean.labels
    size = max(2, min(settings.batch_size, len(images)))
    while True:
        index = torch.randperm(len(images), generator=generator)[:size].to(images.device)
        yield augment(images[index], generator) if augmented else images[index], labels[index]


def prune_by_accuracy(
    model: nn.Module, masks: Mapping[str, Tensor], clean: CleanImages, settings: DefenseSettings, tolerance: float
) -> float | None:
    """Zero the channels with the lowest masks, as many as the clean images allow, in place.

    The threshold is the highest of 0.9, 0.85 … 0 for which the model without the channels of ``mask ≤ threshold``
    has more than ``1 - tolerance`` of its accuracy before, on the clean images. No trigger is involved.

    Args:
        model: The network.
        masks: Parameter → mask ``[channels]`` of its first axis.
        clean: The clean images.
        settings: Batch size.
        tolerance: Share of the accuracy that may be lost.

    Returns:
        The threshold; None where even 0 costs too much and nothing was pruned.
    """
    batches = clean.batches(settings.batch_size)
    before = clean_accuracy(model, batches).value
    whole = {name: model.get_parameter(name).detach().clone() for name in masks}
    for threshold in THRESHOLDS:
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).copy_(whole[name])[mask <= threshold] = 0
        if clean_accuracy(model, batches).value > (1 - tolerance) * before:
            return threshold
    with torch.no_grad():
        for name, values in whole.items():
            model.get_parameter(name).copy_(values)
    return None
