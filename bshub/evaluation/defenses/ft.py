"""Plain fine-tuning on the clean images.

``min_θ  mean_i CE(f_θ(a(x_i)), y_i)``, every parameter θ, a = random flip and shift.

Source: the baseline that arXiv 1805.12185 (section 4.2) starts from. Hyper-parameters: BackdoorBench's
``config/defense/ft``: 100 epochs, SGD with lr 0.01 falling to 0 along a cosine, momentum 0.9, weight decay 5e-4,
batch norm in training mode; batch size 256 there, ``settings.batch_size`` here.

With ten images an epoch is one step: 100 steps where 5 % of CIFAR-10 gave 1000.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.clean import CleanImages
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.training import logits_of, run_epochs, working_copy


def ft(
    model: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    *,
    epochs: int = 100,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> nn.Module:
    """Fine-tune every parameter.

    Args:
        model: The network; not changed.
        clean: The clean images.
        settings: Seed, batch size, effort.
        epochs: Passes over the images.
        lr: Learning rate of the first epoch.
        momentum: Of SGD.
        weight_decay: Of SGD.

    Returns:
        The fine-tuned copy.
    """
    with working_copy(model, settings) as (student, generator):
        finetune(
            student, clean, settings, generator, epochs=epochs, lr=lr, momentum=momentum, weight_decay=weight_decay
        )
    return student


def finetune(
    student: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    generator: torch.Generator,
    *,
    epochs: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    after_step: Callable[[], None] | None = None,
) -> list[float]:
    """The training itself, in place, on a model in training mode.

    Args:
        student: The network; changed.
        clean: Clean images.
        settings: Batch size and progress.
        generator: Of order and augmentation.
        epochs: Passes over the images.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD.
        after_step: Called after every step, to put constraints back.

    Returns:
        The mean loss of each epoch.
    """

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(student, images), labels)

    rounds = settings.rounds(epochs)
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    return run_epochs(rounds, clean, settings, generator, loss_of, optimizer, schedule=cosine, after_step=after_step)
