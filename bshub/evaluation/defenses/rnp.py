"""Reconstructive Neuron Pruning (Li et al., ICML 2023, arXiv 2305.14876, algorithm 1).

Two opposite lessons on the same clean images:

    unlearn:  θ̂ = arg max_θ CE(f(x; θ), y), until the clean accuracy is at most CA_min
    recover:  m = arg min_{m ∈ [0, 1]} α · CE(f(x; m·θ̂), y), one mask per batch-norm channel, θ̂ fixed

What unlearning clean images left untouched is the backdoor; the filters that carry it hinder the recovery, and
their masks fall. Those channels are pruned (γ = 0) in the *original* network.

Official values (the authors' code): unlearning by SGD with lr 0.01, momentum 0.9, weight decay 5e-4, lr divided by
ten after 10 and 20 of at most 21 epochs, CA_min 0.2; recovery by SGD with lr 0.2, momentum 0.9, α 0.2, 20 epochs;
batches of 128 of 500 images, everything in training mode; thresholds 0, 0.05 … 0.9.

Deviations: lengths are counted in steps, four to a published epoch, because algorithm 1 repeats *until* CA_min and
ten epochs of one batch would not get there; an ascent that leaves the finite numbers is taken back by one step.
The threshold is the highest that keeps 90 % of the clean accuracy (the tolerance of BackdoorBench); the code prints
ACC and ASR of each. The code's gradient clipping runs before the gradients exist, so there is none here.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.clean import CleanImages
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.masking import call_with, prune_by_accuracy, scaled_norms
from bshub.evaluation.defenses.training import epoch_batches, working_copy
from bshub.evaluation.defenses.unlearning import ascent_step


def rnp(
    model: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    *,
    unlearning_lr: float = 0.01,
    unlearning_steps: int = 84,
    clean_threshold: float = 0.2,
    recovering_lr: float = 0.2,
    recovering_steps: int = 80,
    alpha: float = 0.2,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    tolerance: float = 0.1,
) -> nn.Module:
    """Unlearn, recover, prune.

    Args:
        model: The network; not changed.
        clean: The clean images.
        settings: Seed, batch size, effort.
        unlearning_lr: Of the ascent.
        unlearning_steps: Most steps of the ascent.
        clean_threshold: Clean accuracy at which unlearning ends (CA_min).
        recovering_lr: Of the masks.
        recovering_steps: Steps of the masks.
        alpha: Weight of the recovery's loss.
        momentum: Of both.
        weight_decay: Of the ascent.
        tolerance: Share of the clean accuracy that pruning may cost.

    Returns:
        The pruned copy.

    Raises:
        InconclusiveError: There is no batch norm with a scale.
    """
    clean.drain()
    names = scaled_norms(model)
    with working_copy(model, settings) as (student, generator):
        optimizer = torch.optim.SGD(
            student.parameters(), lr=unlearning_lr, momentum=momentum, weight_decay=weight_decay
        )
        steps = settings.rounds(unlearning_steps)
        unlearn(student, clean, settings, generator, optimizer, steps, clean_threshold)
        masks = recover(
            student,
            names,
            clean,
            settings,
            generator,
            settings.rounds(recovering_steps),
            lr=recovering_lr,
            momentum=momentum,
            alpha=alpha,
        )
    defended = copy.deepcopy(model).eval()
    prune_by_accuracy(defended, masks, clean, settings, tolerance)
    return defended


def unlearn(
    student: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer,
    steps: int,
    clean_threshold: float,
) -> float:
    """Gradient ascent on the clean loss, in place, in the student's own mode.

    Args:
        student: The network, trainable.
        clean: The clean images.
        settings: Batch size and progress.
        generator: Of order and augmentation.
        optimizer: Over the student's parameters.
        steps: At most; the learning rate falls to a tenth after 40 of 84 and again after 80.
        clean_threshold: Ends after a pass over the images with at most this accuracy.

    Returns:
        The accuracy of the last pass, taken before its steps.
    """
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(steps * 40 / 84), round(steps * 80 / 84)])
    done, accuracy = 0, 1.0
    while done < steps and accuracy > clean_threshold:
        right = seen = 0
        for images, labels in epoch_batches(clean, settings, generator):
            logits = ascent_step(student, optimizer, images, labels)
            if logits is None:
                return accuracy
            right, seen = right + int((logits.argmax(1) == labels).sum()), seen + len(labels)
            schedule.step()
            settings.progress(1)
            done += 1
            if done == steps:
                break
        accuracy = right / seen
    return accuracy


def recover(
    student: nn.Module,
    names: list[str],
    clean: CleanImages,
    settings: DefenseSettings,
    generator: torch.Generator,
    steps: int,
    *,
    lr: float,
    momentum: float,
    alpha: float,
) -> dict[str, Tensor]:
    """Learn one mask per channel on the unlearned network, whose parameters stay as they are.

    Args:
        student: The unlearned network.
        names: Its batch norms.
        clean: The clean images.
        settings: Batch size and progress.
        generator: Of order and augmentation.
        steps: How many.
        lr: Learning rate.
        momentum: Of SGD.
        alpha: Weight of the loss.

    Returns:
        Scale γ → mask ``[channels]`` in [0, 1].
    """
    scales = {f"{name}.weight": student.get_parameter(f"{name}.weight").detach() for name in names}
    masks = {name: torch.ones_like(scale).requires_grad_(True) for name, scale in scales.items()}
    student.requires_grad_(False)
    optimizer = torch.optim.SGD(masks.values(), lr=lr, momentum=momentum)
    done = 0
    while done < steps:
        for images, labels in epoch_batches(clean, settings, generator):
            tensors = {name: scale * masks[name] for name, scale in scales.items()}
            loss = alpha * F.cross_entropy(call_with(student, tensors, images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mask in masks.values():
                    mask.clamp_(0, 1)
            settings.progress(1)
            done += 1
            if done == steps:
                break
    return {name: mask.detach() for name, mask in masks.items()}
