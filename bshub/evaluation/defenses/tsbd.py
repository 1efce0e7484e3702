"""Two-Stage Backdoor Defense, TSBD (Lin et al., NeurIPS 2024, arXiv 2405.20291, its two stages).

Stage 1, "neuron weight change-based backdoor reinitialization". Unlearn the clean images by gradient ascent,
θ → θ̂. A neuron (filter o of a convolution) changed by

    NWC(o) = ‖Ŵ[o] - W[o]‖₁

In the original network, of the share n of the neurons with the highest NWC (all layers together), the share m of
the weights with the largest change is set to zero.

Stage 2, "activeness-aware fine-tuning". With L the cross entropy and r·∇L/‖∇L‖ taken for each tensor by itself,

    g = (1 - α) · ∇L(θ) + α · ∇L(θ + r · ∇L(θ)/‖∇L(θ)‖)

is the gradient of L plus a penalty on its gradient norm.

Official values (the authors' code): unlearning by SGD with lr 1e-4 and momentum 0.9 until the clean accuracy is at
most 10 %, at most 1000 epochs; m 0.7; fine-tuning by SGD with lr 0.01 and momentum 0.9, 20 epochs, r 0.05, α 0.7;
batches of 256 in training mode. The code runs n of 0.01 to 0.9, prints ACC and ASR of each and names no default;
n 0.15 of that list is taken here.

Deviations: all 2-d convolutions count, where the code leaves out those called ``shortcut``; batch norm's running
statistics follow the weights before each step rather than after it; a step whose gradient is not finite is left out
(a thin network may lose its signal to the zeros).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.clean import CleanImages
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.masking import call_with, conv_weights
from bshub.evaluation.defenses.training import epoch_batches, working_copy
from bshub.evaluation.defenses.unlearning import ascent_step
from bshub.evaluation.metrics import clean_accuracy

Tensors = dict[str, Tensor]


def tsbd(
    model: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    *,
    neurons: float = 0.15,
    weights: float = 0.7,
    unlearning_lr: float = 1e-4,
    unlearning_epochs: int = 1000,
    clean_threshold: float = 0.1,
    lr: float = 0.01,
    epochs: int = 20,
    radius: float = 0.05,
    alpha: float = 0.7,
    momentum: float = 0.9,
) -> nn.Module:
    """Reset the weights that unlearning moved most, then fine-tune with a small gradient norm.

    Args:
        model: The network; not changed.
        clean: The clean images.
        settings: Seed, batch size, effort.
        neurons: Share of the neurons to reset, n.
        weights: Share of their weights to reset, m.
        unlearning_lr: Of the ascent.
        unlearning_epochs: At most.
        clean_threshold: Clean accuracy at which unlearning ends.
        lr: Of the fine-tuning.
        epochs: Of the fine-tuning.
        radius: Length r of the look-ahead.
        alpha: Weight of the gradient there.
        momentum: Of both.

    Returns:
        The repaired copy.

    Raises:
        InconclusiveError: There is no convolution.
    """
    clean.drain()
    before = {name: weight.detach().clone() for name, weight in conv_weights(model).items()}
    with working_copy(model, settings) as (student, generator):
        optimizer = torch.optim.SGD(student.parameters(), lr=unlearning_lr, momentum=momentum)
        unlearn(student, clean, settings, generator, optimizer, settings.rounds(unlearning_epochs), clean_threshold)
        change = {name: (weight.detach() - before[name]).abs() for name, weight in conv_weights(student).items()}
    with working_copy(model, settings) as (student, generator):
        reset = reinitialise(change, neurons, weights)
        with torch.no_grad():
            for name, chosen in reset.items():
                student.get_parameter(name)[chosen] = 0
        parameters = dict(student.named_parameters())
        optimizer = torch.optim.SGD(parameters.values(), lr=lr, momentum=momentum)
        for _ in range(settings.rounds(epochs)):
            for images, labels in epoch_batches(clean, settings, generator):

                def loss_of(tensors: Mapping[str, Tensor], images: Tensor = images, labels: Tensor = labels) -> Tensor:
                    return F.cross_entropy(call_with(student, tensors, images), labels)

                look_ahead = {name: buffer.clone() for name, buffer in student.named_buffers()}
                gradients = calm_gradient(loss_of, parameters, radius, alpha, look_ahead)
                if all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
                    for name, gradient in gradients.items():
                        parameters[name].grad = gradient
                    optimizer.step()
                settings.progress(1)
    return student


def unlearn(
    student: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    clean_threshold: float,
) -> int:
    """Gradient ascent on the clean loss, in place, until the accuracy in evaluation mode has fallen.

    Args:
        student: The network, trainable, in training mode.
        clean: The clean images.
        settings: Batch size and progress.
        generator: Of order and augmentation.
        optimizer: Over the student's parameters.
        epochs: At most.
        clean_threshold: The accuracy to fall to.

    Returns:
        The number of epochs that it took.
    """
    for epoch in range(epochs):
        for images, labels in epoch_batches(clean, settings, generator):
            if ascent_step(student, optimizer, images, labels) is None:
                return epoch + 1
            settings.progress(1)
        if clean_accuracy(student, clean.batches(settings.batch_size)).value <= clean_threshold:
            return epoch + 1
    return epochs


def neuron_weight_change(change: Mapping[str, Tensor]) -> Tensors:
    """``Σ |Δ|`` of every filter: ``(out, in/groups, kh, kw)`` → ``[out]``.

    Args:
        change: Convolution → Δ of its weights.

    Returns:
        Convolution → ``[out]``.
    """
    return {name: delta.abs().flatten(1).sum(1) for name, delta in change.items()}


def reinitialise(change: Mapping[str, Tensor], neurons: float, weights: float) -> Tensors:
    """Which weights to set to zero.

    Args:
        change: Convolution weights → |Δ|, ``(out, in/groups, kh, kw)``.
        neurons: Share of all neurons, those with the highest weight change.
        weights: Share of these neurons' weights, those with the largest |Δ| of them all.

    Returns:
        The same names → booleans of the same shapes.
    """
    chosen = _highest(neuron_weight_change(change), neurons)
    candidates = {name: delta[chosen[name]] for name, delta in change.items()}
    reset = {name: torch.zeros_like(delta, dtype=torch.bool) for name, delta in change.items()}
    for name, index in _highest(candidates, weights).items():
        reset[name][chosen[name]] = index
    return reset


def _highest(values: Mapping[str, Tensor], share: float) -> Tensors:
    """The share with the highest values of all tensors together, as booleans; at least one."""
    pool = torch.cat([value.flatten() for value in values.values()])
    index = torch.zeros_like(pool, dtype=torch.bool)
    index[pool.topk(max(1, int(share * len(pool)))).indices] = True
    parts = index.split([value.numel() for value in values.values()])
    return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}


def calm_gradient(
    loss_of: Callable[[Mapping[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    radius: float,
    alpha: float,
    buffers: Mapping[str, Tensor],
) -> Tensors:
    """``(1 - α)·∇L(θ) + α·∇L(θ + r·∇L(θ)/‖∇L(θ)‖)``, the norm of each tensor by itself.

    Args:
        loss_of: Parameters and buffers → loss.
        parameters: θ.
        radius: r.
        alpha: α.
        buffers: Exchanged in the second run, so that the look-ahead leaves no trace in them.

    Returns:
        Parameter → gradient.
    """
    first = torch.autograd.grad(loss_of(parameters), list(parameters.values()), materialize_grads=True)
    moved = {
        name: (parameter + radius * gradient / gradient.norm().clamp_min(1e-12)).detach().requires_grad_(True)
        for (name, parameter), gradient in zip(parameters.items(), first, strict=True)
    }
    second = torch.autograd.grad(loss_of({**moved, **buffers}), list(moved.values()), materialize_grads=True)
    return {
        name: (1 - alpha) * here + alpha * there for name, here, there in zip(parameters, first, second, strict=True)
    }
