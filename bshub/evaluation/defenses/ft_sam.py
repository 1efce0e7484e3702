"""Fine-tuning with adaptive sharpness-aware minimisation: large weights, which carry triggers, shrink most.

``min_w  max_{‖T_w⁻¹ ε‖₂ ≤ ρ}  L(w + ε)``, T_w = diag(|w|), L = cross entropy with smoothed labels. To first order
the maximum lies at ``ε = ρ · T_w² g / ‖T_w g‖₂``, g = ∇L(w) over all parameters together; the step taken at w
is SGD's with the gradient found at w + ε.

Source: arXiv 2304.11823, section 4 (equations 1 to 4). Hyper-parameters of the official code (BackdoorBench,
``config/defense/ft-sam``): ρ 2, adaptive, label smoothing 0.1 (spread over the other classes), 100 epochs, SGD with
lr 0.01 along a cosine of 100 steps, momentum 0.9, weight decay 5e-4, batch norm in training mode with running
statistics fed by the first pass only; batch size 256 there, ``settings.batch_size`` here.

Deviations: the cosine falls once over all epochs (the official code steps it per batch, so that it rises and falls
again). With ten images an epoch is one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bshub.clean import CleanImages
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.training import epoch_batches, logits_of, working_copy

TINY = 1e-12


def ft_sam(
    model: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    *,
    rho: float = 2.0,
    smoothing: float = 0.1,
    epochs: int = 100,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> nn.Module:
    """Fine-tune every parameter against its worst neighbour.

    Args:
        model: The network; not changed.
        clean: The clean images.
        settings: Seed, batch size, effort.
        rho: Radius of the neighbourhood, relative to each weight.
        smoothing: Share of the label that is spread over the other classes.
        epochs: Passes over the images, two gradients a batch.
        lr: Learning rate of the first epoch.
        momentum: Of SGD.
        weight_decay: Of SGD.

    Returns:
        The fine-tuned copy.
    """
    rounds = settings.rounds(epochs)
    with working_copy(model, settings) as (student, generator):
        parameters = list(student.parameters())
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
        for _ in range(rounds):
            for images, labels in epoch_batches(clean, settings, generator):
                _set_gradients(student, images, labels, smoothing)
                with perturbed(parameters, rho), _frozen_statistics(student):
                    _set_gradients(student, images, labels, smoothing)
                optimizer.step()
                settings.progress(1)
            cosine.step()
    return student


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross entropy with ``1 - s`` on the label and ``s / (classes - 1)`` on each other class, mean over images.

    Args:
        logits: ``(n, classes)``.
        labels: ``(n,)``.
        smoothing: s.

    Returns:
        A scalar.
    """
    classes = logits.shape[1]
    # torch spreads its share over all classes, the label among them
    return F.cross_entropy(logits, labels, label_smoothing=min(1.0, smoothing * classes / max(classes - 1, 1)))


def worst_step(parameters: Sequence[Tensor], rho: float) -> list[Tensor]:
    """``ε = ρ · w² g / ‖|w| g‖₂`` from the parameters' gradients; zero where there is none.

    Args:
        parameters: With gradients.
        rho: Radius ρ.

    Returns:
        One tensor a parameter, of its shape.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    scaled = [p.detach().abs() * g for p, g in zip(parameters, gradients, strict=True)]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(s) for s in scaled]))
    return [rho / (norm + TINY) * p.detach().abs() * s for p, s in zip(parameters, scaled, strict=True)]


@contextmanager
def perturbed(parameters: Sequence[Tensor], rho: float) -> Iterator[None]:
    """Inside, the parameters stand at ``w + ε``; afterwards at ``w``, bit for bit.

    Args:
        parameters: With gradients.
        rho: Radius ρ.

    Returns:
        A context; nothing is yielded.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, step in zip(parameters, worst_step(parameters, rho), strict=True):
            parameter.add_(step)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch and do not note it: the perturbed network's statistics are not the model's."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _set_gradients(model: nn.Module, images: Tensor, labels: Tensor, smoothing: float) -> None:
    model.zero_grad(set_to_none=True)
    smoothed_cross_entropy(logits_of(model, images), labels, smoothing).backward()
