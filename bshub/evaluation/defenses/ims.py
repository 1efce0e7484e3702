"""Invertible Masking using Selection, IMS (Dunnett et al., NeurIPS 2025, "Backdoor Mitigation via Invertible
Pruning Masks", arXiv 2509.15497, algorithm 1).

Every filter of every convolution has a mask variable a and a selection s, both in [0, 1]. With a' = σ(k·(a - ½))
its output is multiplied by

    v = a' + s·(1 - a'),    and in the inverse network by    v̄ = (1 - a') + s·a'

so that an unselected filter (s = 0) belongs to one of the two networks and a selected one (s = 1) to both. f is the
network as given, f_v and f_v̄ the masked ones, p·q the overlap of two softmax answers,
``agree(p, q) = -log p·q``, ``disagree(p, q) = -log(1 - p·q)``:

    inner:  min_δ      agree(f_v̄(x+δ), f(x+δ)) + disagree(f(x+δ), f(x)),   one δ per image
    outer:  min_{a, s}  agree(f_v(x), f(x)) + agree(f_v(x+δ), f(x)) + agree(f_v̄(x+δ), f(x+δ))
                     + disagree(f_v̄(x+δ), f(x)) + disagree(f_v̄(x), f(x)) + β · mean(1 - s)

First a warm-up of (a, s) alone on ``agree(f_v(x), f(x)) + disagree(f_v̄(x), f(x)) + β · mean(1 - s)``, then the
outer problem with β = 0, then with β. No labels are used.

Official values (the authors' code and its configuration): k 20, β 10; a and s start at 1, AdamW with lr 0.02; δ
starts at 0, 20 steps of AdamW with lr 0.001, |δ| ≤ 1 in units of the pixel range; at most 100, 200 and 200 rounds, each
phase ending after more than 25 rounds without a loss below 0.98 of the best; batches of 256, evaluation mode.

Deviations: the pixel range is read off the clean images. The v of the end are multiplied into the filters and their
biases, which computes the same; convolutions that normalise their weights have no scale and stay out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from bshub.clean import CleanImages
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.masking import call_with, conv_weights, random_batches
from bshub.evaluation.defenses.pixels import PixelRange
from bshub.evaluation.defenses.training import working_copy

Tensors = dict[str, Tensor]
Classify = Callable[[Tensor], Tensor]
TINY = 1e-8


class Masks:
    """Mask variables ``a`` and selections ``s`` of the filters, weight name → ``[out]``, all 1 at first."""

    def __init__(self, model: nn.Module, steepness: float) -> None:
        self._model, self._steepness = model, steepness
        self._parameters = dict(model.named_parameters())
        weights = {name: weight for name, weight in conv_weights(model).items() if _has_scale(model, name)}
        self.masks = {name: weight.new_ones(len(weight)).requires_grad_(True) for name, weight in weights.items()}
        self.selections = {name: weight.new_ones(len(weight)).requires_grad_(True) for name, weight in weights.items()}

    def values(self, *, inverse: bool) -> Tensors:
        """``v`` or ``v̄`` of every filter, ``[out]``."""
        values = {}
        for name, mask in self.masks.items():
            kept = torch.sigmoid(self._steepness * ((1 - mask if inverse else mask) - 0.5))
            values[name] = kept + self.selections[name] * (1 - kept)
        return values

    def tensors(self, *, inverse: bool) -> Tensors:
        """The masked filters and their biases."""
        tensors = {}
        for name, value in self.values(inverse=inverse).items():
            tensors[name] = self._parameters[name] * value.view(-1, 1, 1, 1)
            bias = name.removesuffix("weight") + "bias"
            if bias in self._parameters:
                tensors[bias] = self._parameters[bias] * value
        return tensors

    def classify(self, images: Tensor, *, inverse: bool = False) -> Tensor:
        """Logits ``[n, classes]`` of the masked network."""
        return call_with(self._model, self.tensors(inverse=inverse), images)

    def variables(self) -> list[Tensor]:
        """What is learned."""
        return [*self.selections.values(), *self.masks.values()]

    def sparsity(self) -> Tensor:
        """``mean(1 - s)`` over all filters."""
        return (1 - torch.cat(list(self.selections.values()))).mean()


def ims(
    model: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    *,
    steepness: float = 20.0,
    l1_weight: float = 10.0,
    lr: float = 0.02,
    perturbation_lr: float = 0.001,
    perturbation_steps: int = 20,
    perturbation_bound: float = 1.0,
    warm_up_rounds: int = 100,
    rounds: int = 200,
    patience: int = 25,
    improvement: float = 0.98,
) -> nn.Module:
    """Learn a mask whose inverse keeps the backdoor, and apply it.

    Args:
        model: The network; not changed.
        clean: The clean images.
        settings: Seed, batch size, effort (of the rounds).
        steepness: k.
        l1_weight: β.
        lr: Of masks and selections.
        perturbation_lr: Of δ.
        perturbation_steps: Of δ, in every round.
        perturbation_bound: Largest |δ|, in units of the pixel range.
        warm_up_rounds: Most rounds of the warm-up.
        rounds: Most rounds without β, and again with it.
        patience: Rounds without progress before a phase ends.
        improvement: A loss below this share of the best is progress.

    Returns:
        The masked copy.

    Raises:
        InconclusiveError: There is no convolution.
    """
    clean.drain()
    pixels = PixelRange.of(clean.images)
    with working_copy(model, settings) as (student, generator):
        student.eval().requires_grad_(False)
        masks = Masks(student, steepness)
        batches = (images for images, _ in random_batches(clean, settings, generator, augmented=False))

        def perturb(images: Tensor) -> Tensor:
            return pixels.add(
                images,
                find_perturbations(
                    student, masks, images, pixels, perturbation_lr, perturbation_steps, perturbation_bound
                ),
            )

        def warm_up(images: Tensor) -> Tensor:
            with torch.no_grad():
                answers = call_with(student, {}, images)
            loss = agree(masks.classify(images), answers) + disagree(masks.classify(images, inverse=True), answers)
            return loss + l1_weight * masks.sparsity()

        def separate(images: Tensor) -> Tensor:
            return outer_loss(student, masks, images, perturb(images))

        def separate_sparsely(images: Tensor) -> Tensor:
            return separate(images) + l1_weight * masks.sparsity()

        phases = ((warm_up, warm_up_rounds), (separate, rounds), (separate_sparsely, rounds))
        for loss_of, published in phases:
            phase = islice(batches, settings.rounds(published))
            run_phase(loss_of, phase, masks.variables(), settings, lr, patience, improvement)
        with torch.no_grad():
            for name, tensor in masks.tensors(inverse=False).items():
                student.get_parameter(name).copy_(tensor)
    return student


def run_phase(
    loss_of: Classify,
    batches: Iterator[Tensor],
    variables: list[Tensor],
    settings: DefenseSettings,
    lr: float,
    patience: int,
    improvement: float,
) -> int:
    """Minimise over variables in [0, 1] until the loss stops falling; returns the number of rounds.

    Args:
        loss_of: A batch → a scalar loss.
        batches: Without end.
        variables: What is minimised over; changed.
        settings: Rounds and progress.
        lr: Of Adam.
        patience: Rounds without progress before the phase ends.
        improvement: A loss below this share of the best is progress.

    Returns:
        The number of rounds.
    """
    optimizer = torch.optim.AdamW(variables, lr=lr)
    best, waited, done = float("inf"), 0, 0
    for images in batches:
        loss = loss_of(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for variable in variables:
                variable.clamp_(0, 1)
        settings.progress(1)
        done += 1
        if float(loss.detach()) < improvement * best:
            best, waited = float(loss.detach()), 0
        else:
            waited += 1
            if waited > patience:
                break
    return done


def find_perturbations(
    model: nn.Module, masks: Masks, images: Tensor, pixels: PixelRange, lr: float, steps: int, bound: float
) -> Tensor:
    """The inner problem: what changes the network's answer and survives in the inverse network.

    Args:
        model: The network as given.
        masks: Held still.
        images: ``[n, c, h, w]``.
        pixels: Unit of the perturbations.
        lr: Of AdamW.
        steps: How many.
        bound: Largest absolute value.

    Returns:
        ``[n, c, h, w]``, in units of the pixel range.
    """
    with torch.no_grad():
        answers = call_with(model, {}, images)
        inverse = masks.tensors(inverse=True)
    perturbations = torch.zeros_like(images, requires_grad=True)
    optimizer = torch.optim.AdamW([perturbations], lr=lr)
    for _ in range(steps):
        changed = pixels.add(images, perturbations)
        given = call_with(model, {}, changed)
        loss = agree(call_with(model, inverse, changed), given) + disagree(given, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            perturbations.clamp_(-bound, bound)
    return perturbations.detach()


def outer_loss(model: nn.Module, masks: Masks, images: Tensor, changed: Tensor) -> Tensor:
    """The five terms of the outer problem, without the one of sparsity.

    Args:
        model: The network.
        masks: Of its filters, 0…1.
        images: Clean, ``(n, c, h, w)``.
        changed: The same with the inverted trigger, ``(n, c, h, w)``.

    Returns:
        A scalar.
    """
    with torch.no_grad():
        answers, fooled = call_with(model, {}, images), call_with(model, {}, changed)
    inverse_changed = masks.classify(changed, inverse=True)
    return (
        agree(masks.classify(images), answers)
        + agree(masks.classify(changed), answers)
        + agree(inverse_changed, fooled)
        + disagree(inverse_changed, answers)
        + disagree(masks.classify(images, inverse=True), answers)
    )


def agree(logits: Tensor, others: Tensor) -> Tensor:
    """``-log Σ_c p_c q_c``, mean over images: ``[n, classes]`` each.

    Args:
        logits: Of p.
        others: Of q.

    Returns:
        A scalar.
    """
    return -(_overlap(logits, others) + TINY).log().mean()


def disagree(logits: Tensor, others: Tensor) -> Tensor:
    """``-log(1 - Σ_c p_c q_c)``, mean over images: ``[n, classes]`` each.

    Args:
        logits: Of p.
        others: Of q.

    Returns:
        A scalar.
    """
    return -(1 - _overlap(logits, others) + TINY).log().mean()


def _overlap(logits: Tensor, others: Tensor) -> Tensor:
    return (logits.softmax(1) * others.softmax(1)).sum(1)


def _has_scale(model: nn.Module, name: str) -> bool:
    """Whether half of the weights give half of the output; a convolution that standardises them does not care."""
    conv = model.get_submodule(name.removesuffix(".weight"))
    assert isinstance(conv, nn.Conv2d)
    height, width = (size * stretch for size, stretch in zip(conv.kernel_size, conv.dilation, strict=True))
    probe = torch.randn(1, conv.in_channels, height, width).to(conv.weight)
    silent: Mapping[str, Tensor] = {} if conv.bias is None else {"bias": torch.zeros_like(conv.bias)}
    with torch.no_grad():
        whole = torch.func.functional_call(conv, {"weight": conv.weight, **silent}, (probe,))
        half = torch.func.functional_call(conv, {"weight": conv.weight / 2, **silent}, (probe,))
    return torch.allclose(half, whole / 2, rtol=1e-3, atol=1e-6 * float(whole.abs().max()))
