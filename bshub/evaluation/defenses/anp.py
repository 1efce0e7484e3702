"""Adversarial Neuron Pruning (Wu and Wang, NeurIPS 2021, arXiv 2110.14430, the method section).

Every batch-norm channel gets a mask ``m ∈ [0, 1]``; its scale is ``(m + δ)·γ`` and its shift ``(1 + ξ)·β``:

    min_m  α · CE(f(x; m, 0, 0), y) + (1 - α) · max_{|δ|, |ξ| ≤ ε} CE(f(x; m, δ, ξ), y)

The inner maximum is one step of sign ascent from a random start. Channels whose mask became small are those that
the network abuses most easily; their γ is set to zero.

Official values (the authors' code): ε 0.4, one step of size ε, α 0.2, masks by SGD with lr 0.2 and momentum 0.9,
2000 steps on batches of 128 in training mode, thresholds 0, 0.05 … 0.9.

Deviations: the perturbation is projected onto ``[-ε, ε]``, the bound of the inner problem (the code lets the random
start and the step add up to 2ε). The threshold is the highest that keeps 90 % of the clean accuracy (the tolerance
of BackdoorBench, arXiv 2206.12654); the code prints ACC and ASR of every threshold and leaves the choice to a
reader who knows the trigger.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.clean import CleanImages
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.masking import call_with, prune_by_accuracy, random_batches, scaled_norms
from bshub.evaluation.defenses.training import working_copy

Tensors = dict[str, Tensor]


def anp(
    model: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    *,
    eps: float = 0.4,
    ascent_steps: int = 1,
    alpha: float = 0.2,
    lr: float = 0.2,
    momentum: float = 0.9,
    iterations: int = 2000,
    tolerance: float = 0.1,
) -> nn.Module:
    """Learn the masks, then prune by clean accuracy.

    Args:
        model: The network; not changed.
        clean: The clean images.
        settings: Seed, batch size, effort.
        eps: Largest relative change of a channel's scale and shift.
        ascent_steps: Steps of the inner maximum.
        alpha: Weight of the unperturbed loss.
        lr: Of the masks.
        momentum: Of the masks.
        iterations: Steps of the masks.
        tolerance: Share of the clean accuracy that pruning may cost.

    Returns:
        The pruned copy.

    Raises:
        InconclusiveError: There is no batch norm with a scale.
    """
    clean.drain()
    with working_copy(model, settings) as (student, generator):
        names = [f"{name}.weight" for name in scaled_norms(student)]
        masks = {name: torch.ones_like(student.get_parameter(name)).detach().requires_grad_(True) for name in names}
        student.requires_grad_(False)
        optimizer = torch.optim.SGD(masks.values(), lr=lr, momentum=momentum)
        batches = random_batches(clean, settings, generator, augmented=True)
        for images, labels in islice(batches, settings.rounds(iterations)):
            mask_step(student, masks, optimizer, images, labels, eps, ascent_steps, alpha, generator)
            settings.progress(1)
    defended = copy.deepcopy(model).eval()
    prune_by_accuracy(defended, {name: mask.detach() for name, mask in masks.items()}, clean, settings, tolerance)
    return defended


def mask_step(
    student: nn.Module,
    masks: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    eps: float,
    ascent_steps: int,
    alpha: float,
    generator: torch.Generator,
) -> Tensors:
    """One inner maximum and one step of the masks, in place; the parameters stay.

    Args:
        student: The network, in training mode.
        masks: Scale γ → mask ``[channels]``, trainable.
        optimizer: Over the masks.
        images: ``[n, c, h, w]``.
        labels: ``[n]``.
        eps: Bound of the noise.
        ascent_steps: Of the inner maximum.
        alpha: Weight of the loss without noise.
        generator: Of the start of the noise.

    Returns:
        The noise: parameter → ``[channels]``.
    """

    def loss_of(noise: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(call_with(student, perturbed(student, masks, noise), images), labels)

    noise = worst_noise(loss_of, _affine(student, masks), eps, ascent_steps, generator)
    loss = alpha * loss_of({}) + (1 - alpha) * loss_of(noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for mask in masks.values():
            mask.clamp_(0, 1)
    return noise


def perturbed(model: nn.Module, masks: Mapping[str, Tensor], noise: Mapping[str, Tensor]) -> Tensors:
    """``(m + δ)·γ`` and ``(1 + ξ)·β`` of every masked batch norm; without noise ``m·γ`` alone.

    Args:
        model: The network.
        masks: Batch norm → ``m [out]``.
        noise: Parameter → its relative change ``[out]``, δ or ξ; may be empty.

    Returns:
        Parameter → its perturbed value ``[out]``.
    """
    tensors = {}
    for name, mask in masks.items():
        tensors[name] = model.get_parameter(name) * (mask + noise[name] if name in noise else mask)
    for name in noise.keys() - masks.keys():
        tensors[name] = model.get_parameter(name) * (1 + noise[name])
    return tensors


def worst_noise(
    loss_of: Callable[[Mapping[str, Tensor]], Tensor],
    like: Mapping[str, Tensor],
    eps: float,
    steps: int,
    generator: torch.Generator,
) -> Tensors:
    """Sign ascent on the loss: ``δ ← clip(δ + ε/steps · sign ∇_δ loss, ±ε)`` from a uniform start.

    Args:
        loss_of: Noise → loss.
        like: Parameter → tensor of the noise's shape.
        eps: Bound of every element.
        steps: How many.
        generator: Of the start, on the CPU.

    Returns:
        Parameter → noise.
    """
    noise = {
        name: ((2 * torch.rand(tensor.shape, generator=generator) - 1) * eps).to(tensor)
        for name, tensor in like.items()
    }
    for _ in range(steps):
        leaves = {name: value.requires_grad_(True) for name, value in noise.items()}
        gradients = torch.autograd.grad(loss_of(leaves), list(leaves.values()), materialize_grads=True)
        noise = {
            name: (leaf.detach() + eps / steps * gradient.sign()).clamp(-eps, eps)
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }
    return noise


def _affine(model: nn.Module, masks: Mapping[str, Tensor]) -> Tensors:
    """The masked scales and the shifts beside them."""
    parameters = dict(model.named_parameters())
    shifts = (name.removesuffix("weight") + "bias" for name in masks)
    return {name: parameters[name] for name in (*masks, *shifts) if name in parameters}
