"""What the training defenses share: a seeded working copy, augmented batches, a loop over epochs.

One epoch shows every clean image once. With ten images and a published batch size of 64 or more an epoch is one
step: 100 published epochs stay 100 epochs, which then are 100 steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bshub.augment import augment
from bshub.clean import CleanImages
from bshub.evaluation.defenses.interface import DefenseSettings

BatchLoss = Callable[[Tensor, Tensor], Tensor]
"""``(images [n, c, h, w], labels [n]) → loss``, a scalar that can be differentiated."""


@contextmanager
def working_copy(model: nn.Module, settings: DefenseSettings) -> Iterator[tuple[nn.Module, torch.Generator]]:
    """A copy of the model to train, and the generator of order and augmentation.

    Inside, the copy is in training mode with every parameter trainable, and everything random (dropout too)
    follows ``settings.seed``. Afterwards the copy is in evaluation mode, without gradients, its parameters as
    trainable as the model's; the global generators are as before.
    """
    student = copy.deepcopy(model)
    flags = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(True)
    student.train()
    device = flags[0][0].device if flags else torch.device("cpu")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        yield student, torch.Generator().manual_seed(settings.seed)
    student.eval()
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
        parameter.grad = None


def epoch_batches(
    clean: CleanImages, settings: DefenseSettings, generator: torch.Generator, *, augmented: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """The kept clean images once, in random order.

    A lone last image joins the batch before it, since batch norm in training mode refuses one image.

    Yields:
        ``(images [n, c, h, w], labels [n])``, 2 ≤ n ≤ ``settings.batch_size`` + 1.
    """
    clean.drain()
    images, labels = clean.images, clean.labels
    parts = list(torch.randperm(len(images), generator=generator).split(max(2, settings.batch_size)))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    for index in parts:
        index = index.to(images.device)
        yield augment(images[index], generator) if augmented else images[index], labels[index]


def run_epochs(
    epochs: int,
    clean: CleanImages,
    settings: DefenseSettings,
    generator: torch.Generator,
    loss_of: BatchLoss,
    optimizer: torch.optim.Optimizer,
    *,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    after_step: Callable[[], None] | None = None,
) -> list[float]:
    """Minimise ``loss_of`` on augmented batches.

    Args:
        epochs: How many, already scaled by ``settings.rounds``.
        clean: The clean images.
        settings: Batch size and progress.
        generator: Of order and augmentation.
        loss_of: The loss of one batch.
        optimizer: Over the parameters that learn.
        schedule: Advanced after every epoch.
        after_step: Called after every step, for what must hold again (pruned channels stay zero).

    Returns:
        The mean loss of each epoch.
    """
    losses = []
    for _ in range(epochs):
        total = count = 0.0
        for images, labels in epoch_batches(clean, settings, generator):
            loss = loss_of(images, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if after_step:
                after_step()
            total += float(loss.detach()) * len(labels)
            count += len(labels)
            settings.progress(1)
        if schedule:
            schedule.step()
        losses.append(total / count)
    return losses


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The classifier's answer, ``[n, classes]``."""
    return first_tensor(model(images))


def first_tensor(answer: Any) -> Tensor:
    """The logits in a model's answer; in training mode some networks add those of auxiliary heads."""
    return answer if isinstance(answer, Tensor) else answer[0]
