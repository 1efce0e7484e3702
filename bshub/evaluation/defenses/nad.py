"""Neural attention distillation: a fine-tuned copy teaches the network where to look.

``L = CE(f_S(a(x)), y) + Σ_l β_l · MSE(A(F_l^S), A(F_l^T))``, with the attention map
``A(F) = Σ_c |F_c|^p / (‖Σ_c |F_c|^p‖₂ + 1e-6)`` of a feature map ``F (n, c, h, w)``, normalised per image, the mean
squared error taken over images and places, T the teacher (the same network fine-tuned on the same images,
evaluation mode), S the student (the given network, training mode).

Source: arXiv 2101.05930, section 3 (equations 1 to 4). Hyper-parameters of the paper's section 4.1 and of the
authors' code: p = 2, β = 500, 1000, 1000 for three stages, teacher 10 epochs, student 20 epochs, SGD with Nesterov
momentum 0.9, weight decay 1e-4, lr 0.1 for two epochs and 0.01 after that; batch size 64 there,
``settings.batch_size`` here. BackdoorBench runs 10 epochs at lr 0.01 instead. The first two epochs at 0.1 are meant
for 2500 images; with a hundred they cost a network much of its accuracy, and lr 0.01 leaves it its backdoor.

Deviations: the three stages are the last maps at the three smallest resolutions of whatever network it is; with
fewer resolutions the first β are left out. Cutout is not part of the augmentation. With ten images an epoch is
one step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.clean import CleanImages
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.stages import find_stages, run_with_stages
from bshub.evaluation.defenses.training import BatchLoss, first_tensor, logits_of, run_epochs, working_copy

EPSILON = 1e-6
HIGH_LR_EPOCHS = 2


def nad(
    model: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    *,
    betas: Sequence[float] = (500.0, 1000.0, 1000.0),
    power: float = 2.0,
    teacher_epochs: int = 10,
    epochs: int = 20,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> nn.Module:
    """Fine-tune a teacher, then distil its attention into the network.

    Args:
        model: The network; not changed.
        clean: The clean images.
        settings: Seed, batch size, effort.
        betas: Weight of each stage's attention loss, from the earliest to the last.
        power: p.
        teacher_epochs: Passes of the teacher.
        epochs: Passes of the student.
        lr: Learning rate of the first two epochs, a tenth of it after them.
        momentum: Of SGD.
        weight_decay: Of SGD.

    Returns:
        The student.
    """

    def train(network: nn.Module, generator: torch.Generator, rounds: int, loss_of: BatchLoss) -> None:
        optimizer = torch.optim.SGD(
            network.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
        )
        falling = torch.optim.lr_scheduler.MultiStepLR(optimizer, [settings.rounds(HIGH_LR_EPOCHS)], gamma=0.1)
        run_epochs(rounds, clean, settings, generator, loss_of, optimizer, schedule=falling)

    with working_copy(model, settings) as (teacher, generator):
        train(
            teacher,
            generator,
            settings.rounds(teacher_epochs),
            lambda images, labels: F.cross_entropy(logits_of(teacher, images), labels),
        )
    teacher.requires_grad_(False)
    stages = find_stages(teacher, clean.images, len(betas))
    used = list(betas)[len(betas) - len(stages) :]
    with working_copy(model, settings) as (student, generator):

        def distil(images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                _, taught = run_with_stages(teacher, images, stages)
            answer, learned = run_with_stages(student, images, stages)
            return F.cross_entropy(first_tensor(answer), labels) + attention_loss(learned, taught, used, power)

        train(student, generator, settings.rounds(epochs), distil)
    return student


def attention_loss(learned: Sequence[Tensor], taught: Sequence[Tensor], betas: Sequence[float], power: float) -> Tensor:
    """``Σ_l β_l · MSE(A(F_l^S), A(F_l^T))``.

    Args:
        learned: The student's maps, ``(n, c, h, w)`` each.
        taught: The teacher's; no gradient goes to them.
        betas: One weight a stage.
        power: p.

    Returns:
        A scalar; zero without stages.
    """
    losses = [
        beta * F.mse_loss(attention_map(mine, power), attention_map(theirs.detach(), power))
        for mine, theirs, beta in zip(learned, taught, betas, strict=True)
    ]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def attention_map(features: Tensor, power: float) -> Tensor:
    """``Σ_c |F_c|^p``, divided by its L2 norm over the places: ``(n, c, h, w)`` → ``(n, h, w)``.

    Args:
        features: F.
        power: p.

    Returns:
        ``(n, h, w)``.
    """
    energy = features.abs().pow(power).sum(1)  # (n, h, w)
    return energy / (torch.linalg.vector_norm(energy, dim=(1, 2), keepdim=True) + EPSILON)
