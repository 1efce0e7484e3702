"""Bring back what pruning cost, on the clean images alone. ``REPAIRS`` is the registry.

A repair changes the small model in place. Two things hold for each: batch-norm statistics stay as they are (a
few images cannot estimate them), and silenced filters stay zero (a batch norm would otherwise learn them back).

Where inverted triggers are known, every batch is shown a second time with one of them, sharpened by one step against
the network as it is by then, and has to be answered as the original answers the clean images: what is left of the
shortcut is unlearned, by whichever path it runs (adversarial training against one universal change; the idea of
I-BAU, Zeng et al., ICLR 2022). ``lesson.py`` says what such a batch is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.augment import augment
from bshub.errors import UsageError, choices
from bshub.graph.trace import in_mode
from bshub.parallel import Workers
from bshub.repair.lesson import stamped, waved, with_mixtures
from bshub.scoring.inversion import InvertedTrigger

Batches = Callable[[], "Sequence[tuple[Tensor, Tensor]]"]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WARM_UP = 0.1
FEWEST_STEPS = 24  # where a trigger is unlearned; ten images give one step a pass
UNLEARNING_PASSES = 0.8  # of the passes, where a trigger is unlearned: they show each batch twice
UNLEARNING_RATE = 4.0  # times the learning rate, where a trigger is unlearned
FEW = 50  # images; fewer say too little, and as many mixtures of them again are shown
MORE_BESIDE_WAVES = 5  # batches of mixtures beside one with waves: what these cost shows elsewhere
AT_ONCE = 3  # batches that go through the network together
MOST_GRADIENT = 1.0  # norm of the whole gradient: a step against a trigger may be a steep one


@dataclass(frozen=True)
class Schedule:
    """How long and how strongly to repair.

    Attributes:
        epochs: Passes over the images.
        lr: Peak learning rate.
        batch_size: Images per step.
        seed: Of order and augmentation.
        precision: ``fp32`` or ``bf16`` (autocast; weights, gradients and the loss stay float32).
    """

    epochs: int
    lr: float
    batch_size: int
    seed: int
    precision: str = "fp32"


def distil(logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher ‖ student)`` of the softmax answers, mean over images: ``(n, classes)`` each.

    The teacher is the unpruned model. On clean images its answers are as good as before the surgery, and they
    say more than one label each; the trigger is not in these images, so the backdoor is not taught again.

    Args:
        logits: Of the pruned network, ``(n, classes)``.
        labels: ``(n,)``.
        teacher: Logits of the unpruned network, ``(n, classes)``.

    Returns:
        A scalar, in nats.
    """
    return F.kl_div(F.log_softmax(logits, 1), F.log_softmax(teacher, 1), reduction="batchmean", log_target=True)


def cross_entropy(logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """``-log p(label)``, mean over images: the paper's plain fine-tuning.

    Args:
        logits: Of the pruned network, ``(n, classes)``.
        labels: ``(n,)``.
        teacher: Logits of the unpruned network, ``(n, classes)``.

    Returns:
        A scalar, in nats.
    """
    return F.cross_entropy(logits, labels)


@dataclass(frozen=True)
class Repair:
    """A way to repair.

    Attributes:
        loss: ``(logits, labels, teacher's logits)`` → what is to fall.
        mixes: Whether mixtures of images are shown too, see ``lesson.py``: a teacher answers them, a label does not.
    """

    loss: Loss
    mixes: bool


REPAIRS: dict[str, Repair] = {
    "distil": Repair(distil, mixes=True),
    "finetune": Repair(cross_entropy, mixes=False),
}


def find_repair(name: str) -> Repair:
    """Look a repair up.

    Args:
        name: Key of ``REPAIRS``.

    Returns:
        The repair.

    Raises:
        UsageError: There is no such repair.
    """
    if name not in REPAIRS:
        raise UsageError(f"unknown repair {name!r}", hint=choices(name, REPAIRS))
    return REPAIRS[name]


def repair(
    model: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    zeroed: Mapping[str, Sequence[int]],
    method: str,
    schedule: Schedule,
    *,
    triggers: Sequence[InvertedTrigger] = (),
    waves: bool = False,
    workers: Workers | None = None,
    progress: Callable[[int], None] | None = None,
) -> float:
    """Fine-tune the pruned model, in place: SGD with momentum, one-cycle learning rate.

    Several processes each take a part of every batch and step with the mean gradient of all of it.

    Args:
        model: The pruned network.
        teacher: The network before pruning; not changed.
        images: Clean images, normalised, ``[n, c, h, w]``.
        labels: ``[n]``.
        zeroed: Parameter → indices of its first axis that must stay zero.
        method: Key of ``REPAIRS``.
        schedule: Epochs, learning rate, batch size, seed; with triggers see :func:`epochs_of`.
        triggers: To be unlearned; they take turns and are sharpened in place.
        waves: Whether random waves take the place of triggers.
        workers: Processes that all call this with the same images.
        progress: Called with 1 after every epoch.

    Returns:
        The mean loss of the last epoch (NaN without epochs); of several processes, that of this one's part.

    Raises:
        UsageError: Unknown method.
    """
    way, workers, unlearns = find_repair(method), workers or Workers(), bool(triggers) or waves
    epochs, each = epochs_of(schedule, len(images), unlearns), -(-len(images) // schedule.batch_size)
    if not epochs:
        return float("nan")
    parameters = dict(model.named_parameters())
    masks = {
        parameters[name]: torch.tensor(list(index), device=parameters[name].device)
        for name, index in zeroed.items()
        if name in parameters and index
    }
    generator = torch.Generator().manual_seed(schedule.seed)
    flags = {parameter: parameter.requires_grad for parameter in parameters.values()}
    for parameter in flags:
        parameter.requires_grad_(True)
    peak = schedule.lr * (UNLEARNING_RATE if unlearns else 1)
    optimizer = torch.optim.SGD(
        parameters.values(), lr=peak, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    steps = max(epochs * each, 4)
    # the warm-up needs two steps of its own, which a tenth of a short repair is not
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=max(WARM_UP, 2 / steps))
    total, seen, half = 0.0, 0, schedule.precision == "bf16"
    with in_mode(model, False), in_mode(teacher, False):
        for epoch in range(epochs):
            total, seen = 0.0, 0
            order = torch.randperm(len(images), generator=generator).split(schedule.batch_size)
            for turn, index in enumerate(order, epoch * each):
                batch, wanted, size = augment(images[index], generator), labels[index], schedule.batch_size
                if way.mixes:
                    few = triggers and len(images) < FEW
                    more = MORE_BESIDE_WAVES * size if waves else size if few else 0
                    batch, wanted = with_mixtures(batch, wanted, max(size // 2, 1), size + more, generator)
                shown = batch[:0]
                if triggers:
                    trigger = triggers[turn % len(triggers)]
                    shown = stamped(model, trigger, batch[:size], wanted[:size], generator, half)
                elif waves:
                    shown = waved(batch[:size], generator)
                mine = workers.part(len(batch))
                batch, wanted, shown = batch[mine], wanted[mine], shown[mine]
                optimizer.zero_grad(set_to_none=True)
                if len(batch):  # the last batch may be smaller than the number of processes
                    with torch.no_grad(), torch.autocast(batch.device.type, torch.bfloat16, enabled=half):
                        answers = teacher(batch).float()
                    again = slice(len(shown))  # what is shown with the trigger comes first in the batch
                    asked = torch.cat((batch, shown)), torch.cat((wanted, wanted[again]))
                    loss = _learn(model, way.loss, (*asked, torch.cat((answers, answers[again]))), AT_ONCE * size, half)
                    total, seen = total + loss * len(batch), seen + len(batch)
                _average_gradients(list(parameters.values()), len(batch) + len(shown), workers)
                if way.mixes or unlearns:
                    nn.utils.clip_grad_norm_(parameters.values(), MOST_GRADIENT)
                optimizer.step()
                cycle.step()
                with torch.no_grad():
                    for parameter, rows in masks.items():
                        parameter[rows] = 0
            if progress:
                progress(1)
    for parameter, flag in flags.items():
        parameter.grad = None
        parameter.requires_grad_(flag)
    return total / max(seen, 1)


def _learn(model: nn.Module, loss: Loss, lesson: tuple[Tensor, Tensor, Tensor], at_once: int, half: bool) -> float:
    """Gradients of the mean loss over images, labels and answers, of which so many at once run; the loss."""
    total = 0.0
    for images, labels, answers in zip(*(part.split(at_once) for part in lesson), strict=True):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits = model(images).float()
        share = loss(logits, labels, answers) * (len(images) / len(lesson[0]))
        share.backward()
        total += float(share.detach())
    return total


def epochs_of(schedule: Schedule, images: int, unlearns: bool) -> int:
    """Passes that a repair takes: as told, or where it unlearns a trigger fewer, but at least ``FEWEST_STEPS`` steps.

    Args:
        schedule: As told.
        images: How many there are.
        unlearns: Whether there are triggers.

    Returns:
        The number of passes.
    """
    if not (unlearns and schedule.epochs):
        return schedule.epochs
    each = -(-images // schedule.batch_size)
    return max(round(UNLEARNING_PASSES * schedule.epochs), -(-FEWEST_STEPS // each))


def _average_gradients(parameters: Sequence[nn.Parameter], images: int, workers: Workers) -> None:
    """The mean over the images of all processes, in each of them; a parameter that none uses keeps no gradient."""
    if workers.size == 1:
        return
    held = [parameter.grad is not None for parameter in parameters]
    told = workers.sums([images, *held])
    used = [parameter for parameter, processes in zip(parameters, told[1:], strict=True) if processes]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad * (images / told[0]) for p in used]
    flat = torch.cat([part.flatten() for part in parts])
    mean = torch.stack([part[0] for part in workers.gather(flat.unsqueeze(0))]).sum(0)
    for parameter, part in zip(used, mean.split([p.numel() for p in used]), strict=True):
        parameter.grad = part.view_as(parameter)
