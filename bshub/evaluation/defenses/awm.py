"""Adversarial Weight Masking (Chai and Chen, NeurIPS 2022, arXiv 2207.04497, the method section).

Every weight of every convolution gets a soft mask ``m ∈ [0, 1]``; a universal trigger δ is recovered and unlearned
in turns:

    δ = arg max_{‖δ‖₁ ≤ τ} CE(f(x + δ; m·θ), ŷ),  ŷ = arg max f(x; m·θ)
    min_m  α · CE(f(x; m·θ), y) + (1 - α) · CE(f(clip(x + δ); m·θ), y) + γ · ‖m‖₁

Official values (the authors' code): 20 outer rounds; in each, δ starts at zero, climbs by SGD with lr 10 and is
rescaled to ‖δ‖₁ ≤ 1000 at the end, then the masks take steps of Adam with lr 1e-2 · 0.9^round; five passes over the
images for either; γ 1e-8, α 0.9, evaluation mode throughout. With one image per class (here: no more images than
classes) τ 100, α 0.99, and nine random crops with flips beside each image.

Deviations: τ holds for 3·32·32 values and grows with the image. δ lives in units of the pixel range that the clean
images show (the code's networks take raw pixels). Batches are ``settings.batch_size`` images, at least one batch a
pass. The soft masks are multiplied into the weights at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop

from bshub.clean import KEPT_IMAGES, CleanImages
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.masking import call_with, conv_weights, random_batches
from bshub.evaluation.defenses.pixels import PixelRange
from bshub.evaluation.defenses.training import working_copy

PUBLISHED_VALUES = 3 * 32 * 32
COPIES = 9

Classify = Callable[[Tensor], Tensor]


def awm(
    model: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    *,
    outer: int = 20,
    inner: int = 5,
    lr: float = 1e-2,
    decay: float = 0.9,
    trigger_lr: float = 10.0,
    bound: float | None = None,
    alpha: float | None = None,
    gamma: float = 1e-8,
) -> nn.Module:
    """Mask the weights that a universal perturbation abuses.

    Args:
        model: The network; not changed.
        clean: The clean images.
        settings: Seed, batch size, effort (of the outer rounds).
        outer: Rounds.
        inner: Passes over the images for the trigger, and again for the masks, in each round.
        lr: Of the masks.
        decay: Factor of ``lr`` after each round.
        trigger_lr: Of the trigger.
        bound: Largest ‖δ‖₁ at 3 x 32 x 32 values; None: 1000, or 100 with one image per class.
        alpha: Weight of the clean loss; None: 0.9, or 0.99 with one image per class.
        gamma: Weight of the masks' L1 norm.

    Returns:
        The masked copy.

    Raises:
        InconclusiveError: There is no convolution.
    """
    clean.drain()
    pixels = PixelRange.of(clean.images)
    with working_copy(model, settings) as (student, generator):
        student.eval().requires_grad_(False)
        one_shot = len(clean.images) <= call_with(student, {}, clean.images[:1]).shape[1]
        alpha = (0.99 if one_shot else 0.9) if alpha is None else alpha
        bound = (100.0 if one_shot else 1000.0) if bound is None else bound
        bound *= clean.images[0].numel() / PUBLISHED_VALUES
        if one_shot:
            clean = one_shot_copies(clean)
        weights = {name: weight.detach() for name, weight in conv_weights(student).items()}
        masks = {name: torch.ones_like(weight).requires_grad_(True) for name, weight in weights.items()}
        optimizer = torch.optim.Adam(masks.values(), lr=lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
        batches = random_batches(clean, settings, generator, augmented=False)
        steps = inner * max(1, len(clean.images) // max(2, settings.batch_size))

        def classify(images: Tensor) -> Tensor:
            return call_with(student, masked(weights, masks), images)

        for _ in range(settings.rounds(outer)):
            trigger = universal_trigger(classify, islice(batches, steps), pixels, trigger_lr, bound)
            for images, labels in islice(batches, steps):
                triggered = pixels.clip(pixels.add(images, trigger))
                loss = mask_loss(classify(images), classify(triggered), labels, masks, alpha, gamma)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for mask in masks.values():
                        mask.clamp_(0, 1)
                settings.progress(1)
            schedule.step()
        with torch.no_grad():
            for name, weight in masked(weights, masks).items():
                student.get_parameter(name).copy_(weight)
    return student


def masked(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``m · W`` of each convolution, ``(out, in/groups, kh, kw)``.

    Args:
        weights: Parameter → W.
        masks: Parameter → m, of the same shapes.

    Returns:
        Parameter → m · W.
    """
    return {name: weight * masks[name] for name, weight in weights.items()}


def universal_trigger(
    classify: Classify, batches: Iterator[tuple[Tensor, Tensor]], pixels: PixelRange, lr: float, bound: float
) -> Tensor:
    """One perturbation that moves all images away from the model's own answers.

    Gradient ascent from zero, one step a batch, then a rescaling to the bound.

    Args:
        classify: Images → logits.
        batches: Images, labels (not looked at).
        pixels: Unit of the perturbation.
        lr: Step size.
        bound: Largest L1 norm.

    Returns:
        ``[1, c, h, w]``, in units of the pixel range.
    """
    trigger = torch.zeros(0)
    for images, _ in batches:
        if not trigger.numel():
            trigger = torch.zeros_like(images[:1])
        trigger.requires_grad_(True)
        with torch.no_grad():
            answers = classify(images).argmax(1)
        loss = F.cross_entropy(classify(pixels.add(images, trigger)), answers)
        (gradient,) = torch.autograd.grad(loss, trigger)
        trigger = trigger.detach() + lr * gradient
    return trigger * min(1.0, bound / max(float(trigger.abs().sum()), 1e-30))


def mask_loss(
    logits: Tensor, triggered: Tensor, labels: Tensor, masks: Mapping[str, Tensor], alpha: float, gamma: float
) -> Tensor:
    """``α·CE(logits, y) + (1 - α)·CE(triggered, y) + γ·Σ|m|``: ``[n, classes]`` twice, ``[n]``.

    Args:
        logits: Of the clean images, ``[n, classes]``.
        triggered: Of the same images with the recovered trigger, ``[n, classes]``.
        labels: ``[n]``.
        masks: Convolution → m, of its weights' shape.
        alpha: Weight of the clean images, 0…1.
        gamma: Weight of the masks' L1 norm.

    Returns:
        A scalar.
    """
    loss = alpha * F.cross_entropy(logits, labels) + (1 - alpha) * F.cross_entropy(triggered, labels)
    return loss + gamma * sum(mask.abs().sum() for mask in masks.values())


def one_shot_copies(clean: CleanImages) -> CleanImages:
    """Each image beside nine random crops of it, resized back and flipped at random; fewer where memory ends.

    The choices come from the global generator.

    Args:
        clean: ``n`` clean images.

    Returns:
        Up to ``10 n`` images with their labels.
    """
    images, labels = clean.images, clean.labels
    copies = min(COPIES, KEPT_IMAGES // len(images) - 1)
    crop, flip = RandomResizedCrop(images.shape[-2:], antialias=True), RandomHorizontalFlip()
    crops = [torch.stack([flip(crop(image)) for image in images]) for _ in range(copies)]
    batches = [(images, labels), *((batch, labels) for batch in crops)]
    more = CleanImages(batches, images.device, len(images) * (copies + 1))
    more.drain()
    return more
