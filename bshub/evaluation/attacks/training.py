"""Train a classifier on (poisoned) pictures: SGD with Nesterov momentum, one-cycle learning rate, flips and shifts.

A run that was killed continues after its last whole epoch and ends with the very same weights: everything random is
drawn from the seed and the number of the epoch, never from what came before.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.errors import UsageError
from bshub.evaluation.attacks.data import Pictures
from bshub.evaluation.attacks.interface import POISONED, Attack, seed_of
from bshub.evaluation.attacks.state import load_state, pack, save_state, unpack
from bshub.progress import Steps

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
WARM_UP, START, END = 0.25, 0.04, 1e-4  # share of the steps; shares of the peak learning rate
SHIFT = 1 / 16  # of the image's side, in each direction
LEARNED_LR, LEARNED_BETAS = 0.01, (0.5, 0.9)  # arXiv 2010.08138, section 4.1
VECTOR = 16  # float32 numbers in the widest vectors, AVX-512's
WORTH = 0.9  # bf16 is used where a step takes less than this share of the time


@dataclass(frozen=True)
class Schedule:
    """How long and how strongly to train.

    Attributes:
        epochs: Passes over the images.
        lr: Peak learning rate.
        batch_size: Images per step.
        seed: Of order, augmentation and the attack's choices.
        precision: ``fp32``, ``bf16`` (autocast) or ``auto``, the faster of the two.
    """

    epochs: int
    lr: float
    batch_size: int
    seed: int
    precision: str = "auto"


@dataclass(frozen=True)
class Run:
    """Where and on what a training happens.

    Attributes:
        pictures: Training images with their true labels.
        target: Label that poisoned images get.
        normalise: Pixels in 0…1 → the network's input.
        device: Of the network.
        folder: Where the state is kept.
        steps: Where epochs are shown.
    """

    pictures: Pictures
    target: int
    normalise: Callable[[Tensor], Tensor]
    device: torch.device
    folder: Path
    steps: Steps


def train(model: nn.Module, attack: Attack, schedule: Schedule, run: Run, label: str = "epoch") -> list[dict[str, Any]]:
    """Train the model, in place.

    Args:
        model: Freshly built, on the run's device.
        attack: Whom to poison and how.
        schedule: Epochs, learning rate, batch size, seed.
        run: Data and device.
        label: Of the progress steps.

    Returns:
        One record an epoch: ``loss``, ``seconds``, ``precision``.

    Raises:
        OutputError: The kept state cannot be read.
        UsageError: The training diverged.
    """
    layout = layout_for(model)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    optimizers = _optimizers(model, attack, schedule)
    parts = {"model": model} | ({"learned": attack.learned} if attack.learned is not None else {})
    found = load_state(run.folder)
    history: list[dict[str, Any]] = []
    precision = schedule.precision
    if found:
        record, tensors = found
        history, precision = record["history"], record["precision"]
        unpack(tensors, parts, optimizers)
    n, steps_each = len(run.pictures), _steps(len(run.pictures), schedule.batch_size)
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        for epoch in range(len(history), schedule.epochs):
            start = time.perf_counter()
            if precision == "auto":
                precision = _choose_precision(model, run, schedule.batch_size, layout)
            generator = torch.Generator().manual_seed(seed_of(schedule.seed, 10_000 + epoch))
            torch.manual_seed(seed_of(schedule.seed, 20_000 + epoch))  # dropout and the like
            attack.begin(model, epoch)
            model.train()
            roles, total = attack.roles(epoch), 0.0
            with run.steps.step(f"{label} {epoch + 1}/{schedule.epochs}", n) as advance:
                batches = run.pictures.stream(_batches(n, schedule.batch_size, seed_of(schedule.seed, 30_000 + epoch)))
                for step, (index, images) in enumerate(batches):
                    share = one_cycle((epoch * steps_each + step) / max(schedule.epochs * steps_each - 1, 1))
                    for group in optimizers[0].param_groups:
                        group["lr"] = schedule.lr * share
                    how = run, precision, layout
                    loss = _step(model, attack, optimizers, images, index, roles[index], generator, *how)
                    if not math.isfinite(loss):  # at once: an epoch may be a quarter of an hour
                        where = f"in step {step + 1} of epoch {epoch + 1}"
                        raise UsageError(f"the training diverged {where}", hint="try a smaller --lr")
                    total += loss
                    advance(len(index))
            seconds = round(time.perf_counter() - start, 2)
            history.append({"loss": round(total / steps_each, 5), "seconds": seconds, "precision": precision})
            record = {"precision": precision, "history": history}
            save_state(run.folder, epoch + 1, pack(parts, optimizers), record)
    model.eval()
    return history


def _step(
    model: nn.Module,
    attack: Attack,
    optimizers: list[torch.optim.Optimizer],
    images: Tensor,
    index: Tensor,
    roles: Tensor,
    generator: torch.Generator,
    run: Run,
    precision: str,
    layout: torch.memory_format,
) -> float:
    images = attack.stamp(images, roles, index, generator)  # (k, 3, H, W) uint8
    labels = torch.where(roles == POISONED, run.target, run.pictures.labels[index]).to(run.device)
    pixels = augment(images.to(run.device), generator).float() / 255
    pixels, extra = attack.live(pixels, roles, generator)
    inputs = run.normalise(pixels).to(memory_format=layout)
    with _autocast(run.device, precision):
        logits = model(inputs)
    loss = F.cross_entropy(logits.float(), labels) + extra
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.detach())


def layout_for(model: nn.Module) -> torch.memory_format:
    """Channels last, which is about a quarter faster, where it is safe.

    oneDNN's weight gradient of a 1 × 1 convolution with a stride writes past its buffer in that layout if there are
    fewer input channels than its vectors are wide (its issue 6035): the process dies, or learns nonsense.

    Args:
        model: The network.

    Returns:
        The layout for its weights and inputs.
    """
    narrow = (
        module.kernel_size == (1, 1) and max(module.stride) > 1 and module.in_channels // module.groups < VECTOR
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    )
    return torch.contiguous_format if any(narrow) else torch.channels_last


def one_cycle(progress: float) -> float:
    """Share of the peak learning rate (one cycle, arXiv 1708.07120).

    A cosine rises from 4 % to 100 % in the first quarter of the steps, another falls to 0.01 % in the rest.

    Args:
        progress: Share of the steps that are done, 0 to 1.
    """
    low, share = (START, progress / WARM_UP) if progress < WARM_UP else (END, (1 - progress) / (1 - WARM_UP))
    return low + (1 - low) * (1 - math.cos(math.pi * share)) / 2


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images and shift each by up to a sixteenth of its side (reflection at the border).

    Args:
        images: uint8 ``(n, 3, h, w)``.
        generator: Source of the choices, on the CPU.

    Returns:
        A new uint8 tensor of the same shape.
    """
    n, _, height, width = images.shape
    device = images.device
    flips = torch.rand(n, 1, generator=generator) < 0.5
    rows = _shifted(height, n, generator)  # (n, h): which row each row is taken from
    columns = _shifted(width, n, generator)
    columns = torch.where(flips, columns.flip(1), columns)
    batch = torch.arange(n, device=device).view(n, 1, 1)
    picked = images.permute(0, 2, 3, 1)[batch, rows.to(device).unsqueeze(2), columns.to(device).unsqueeze(1)]
    return picked.permute(0, 3, 1, 2)  # channels last in memory


def _shifted(side: int, n: int, generator: torch.Generator) -> Tensor:
    reach = max(1, int(side * SHIFT))
    index = torch.arange(side) + torch.randint(-reach, reach + 1, (n, 1), generator=generator)  # (n, side)
    index = index.abs()
    return torch.where(index >= side, 2 * (side - 1) - index, index).clamp_(0, side - 1)


def _batches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Random batches of one size; the rest of an epoch, smaller than a batch, is left out."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    yield from order[: _steps(n, size) * size].split(size)


def _steps(n: int, size: int) -> int:
    return max(1, n // size)


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _choose_precision(model: nn.Module, run: Run, size: int, layout: torch.memory_format) -> str:
    """Time two steps in each precision on a copy of the very model; the networks disagree on what is faster."""
    if run.device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    count = min(size, len(run.pictures), 32)
    inputs = run.normalise(run.pictures.read(torch.arange(count)).to(run.device).float() / 255)
    inputs = inputs.to(memory_format=layout)
    probe = copy.deepcopy(model).train()
    best = {"fp32": math.inf, "bf16": math.inf}
    for _ in range(3):
        for precision in best:
            start = time.perf_counter()
            with _autocast(run.device, precision):
                logits = probe(inputs)
            logits.float().square().mean().backward()
            best[precision] = min(best[precision], time.perf_counter() - start)
    return "bf16" if best["bf16"] < WORTH * best["fp32"] else "fp32"


def _optimizers(model: nn.Module, attack: Attack, schedule: Schedule) -> list[torch.optim.Optimizer]:
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(model.parameters(), lr=schedule.lr, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    ]
    if attack.learned is not None:
        trained = [parameter for parameter in attack.learned.parameters() if parameter.requires_grad]
        optimizers.append(torch.optim.Adam(trained, lr=LEARNED_LR, betas=LEARNED_BETAS))
    return optimizers
