"""Implicit backdoor adversarial unlearning: unlearn one perturbation that fools the network on all images.

``min_θ max_δ  H(δ, θ)``, H = cross entropy of the images with δ added. A round finds δ by gradient steps on
``h(δ, θ) = -CE(f_θ(x + δ), f_θ's own answer) + 0.001 · ‖δ‖²``, then steps θ along the *total* gradient, which knows
that δ follows θ:

``dH/dθ = ∂H/∂θ + (∂Φ/∂θ)ᵀ · Σ_{k<K} [(∂Φ/∂δ)ᵀ]^k · ∂H/∂δ``,  Φ(δ, θ) = δ - 0.1 · ∂h/∂δ,

the Neumann series of ``(I - ∂Φ/∂δ)⁻¹`` cut after K terms (the fixed-point method).

Source: arXiv 2110.03735, section 4 and algorithm 1. Hyper-parameters of the authors' code: 5 rounds, K = 5, δ from
zero in one pass of SGD with lr 10, δ added to 1 % of each batch in H (at random), Φ taken on the first batch and its
true labels, evaluation mode throughout. Adam's lr on θ is BackdoorBench's 0.0001 (``config/defense/i-bau``): the
authors' 0.001 is meant for 250 steps on 5000 images, and five such steps on a hundred images wreck a network. Batch
size 100 and 256 there, ``settings.batch_size`` here.

Deviations: at least one image of a batch carries δ (1 % of less than 100 images would be none). δ is added to the
normalised images that the network takes, as in BackdoorBench (the authors' images lie in 0 to 1). A round is one
pass over the images: with fewer than a batch of them one step on δ and one on θ, where 5000 images gave fifty.
Where an operation has no second derivative in PyTorch (hard sigmoid), central differences stand in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.clean import CleanImages
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.training import epoch_batches, logits_of, working_copy

PENALTY = 0.001
REACH = 1e-3  # root mean square of the step of a central difference, in units of the images


def i_bau(
    model: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    *,
    rounds: int = 5,
    terms: int = 5,
    lr: float = 0.0001,
    inner_lr: float = 10.0,
    map_step: float = 0.1,
    portion: float = 0.01,
) -> nn.Module:
    """Alternate between the worst universal perturbation and unlearning it.

    Args:
        model: The network; not changed.
        clean: The clean images.
        settings: Seed, batch size, effort.
        rounds: Passes: one over δ and one over θ each.
        terms: K, terms of the Neumann series.
        lr: Adam's learning rate on θ.
        inner_lr: SGD's learning rate on δ.
        map_step: Step of the fixed-point map Φ.
        portion: Share of each batch that carries δ while unlearning.

    Returns:
        The unlearned copy.
    """
    with working_copy(model, settings) as (student, generator):
        student.eval()
        parameters = list(student.parameters())
        optimizer = torch.optim.Adam(parameters, lr=lr)
        batches = list(epoch_batches(clean, settings, generator, augmented=False))
        first = batches[0]

        def inner(delta: Tensor) -> Tensor:
            return adversary_loss(student, *first, delta)

        for _ in range(settings.rounds(rounds)):
            delta = worst_perturbation(student, batches, inner_lr)
            for images, labels in batches:
                carriers = torch.randperm(len(images), generator=generator)[: max(1, int(portion * len(images)))]
                mask = torch.zeros(len(images), 1, 1, 1, device=images.device)
                mask[carriers.to(images.device)] = 1

                def outer(
                    delta: Tensor, images: Tensor = images, labels: Tensor = labels, mask: Tensor = mask
                ) -> Tensor:
                    return F.cross_entropy(logits_of(student, images + mask * delta), labels)

                gradients = hypergradient(outer, inner, delta, parameters, map_step=map_step, terms=terms)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                settings.progress(1)
    return student


def adversary_loss(model: nn.Module, images: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
    """``-CE(f(x + δ), labels) + 0.001 · ‖δ‖²``: what the adversary minimises. δ is ``(1, c, h, w)``.

    Args:
        model: f.
        images: x, ``(n, c, h, w)``.
        labels: ``(n,)``.
        delta: δ.

    Returns:
        A scalar.
    """
    return PENALTY * delta.square().sum() - F.cross_entropy(logits_of(model, images + delta), labels)


def worst_perturbation(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], lr: float) -> Tensor:
    """One δ for all images: from zero, one gradient step a batch away from the network's own answers.

    Args:
        model: The network.
        batches: ``(images (n, c, h, w), labels (n,))``.
        lr: Step of the ascent.

    Returns:
        ``(1, c, h, w)``.
    """
    delta = torch.zeros_like(batches[0][0][:1])
    for images, _ in batches:
        with torch.no_grad():
            answers = logits_of(model, images).argmax(1)
        delta.requires_grad_(True)
        (slope,) = torch.autograd.grad(adversary_loss(model, images, answers, delta), delta)
        delta = (delta - lr * slope).detach()
    return delta


def hypergradient(
    outer: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor], Tensor],
    delta: Tensor,
    parameters: Sequence[Tensor],
    *,
    map_step: float,
    terms: int,
) -> list[Tensor]:
    """Total gradient of ``outer`` with respect to the parameters, δ being where ``inner`` is least.

    Args:
        outer: δ → loss, a function of the parameters too.
        inner: δ → the adversary's loss, likewise; twice differentiable.
        delta: The perturbation.
        parameters: θ.
        map_step: α of ``Φ(δ) = δ - α · ∂inner/∂δ``.
        terms: Number of terms of the Neumann series, at least 1.

    Returns:
        One tensor a parameter, of its shape.
    """
    delta = delta.detach().requires_grad_(True)
    start, *direct = torch.autograd.grad(outer(delta), [delta, *parameters], allow_unused=True)
    (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)

    exact = True

    def curve(vector: Tensor, *along: Tensor) -> Sequence[Tensor | None]:
        """``∂(slope · vector) / ∂along``."""
        nonlocal exact
        if exact:
            try:
                return torch.autograd.grad(slope, along, vector, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                if "not implemented" not in str(error):  # PyTorch's words for a missing second derivative
                    raise
                exact = False
        return central_differences(inner, delta, vector, along)

    series = start
    for _ in range(terms - 1):
        (bent,) = curve(series, delta)
        series = start + series - (0 if bent is None else map_step * bent)
    through = curve(series, *parameters)
    zeros = [torch.zeros_like(parameter) for parameter in parameters]
    return [
        zero + (0 if one is None else one) - (0 if two is None else map_step * two)
        for zero, one, two in zip(zeros, direct, through, strict=True)
    ]


def central_differences(
    inner: Callable[[Tensor], Tensor], delta: Tensor, vector: Tensor, along: Sequence[Tensor]
) -> list[Tensor | None]:
    """``∂²inner/∂along∂δ · vector`` from first derivatives at two points, ``δ ± r · vector``.

    Args:
        inner: δ → loss.
        delta: The point.
        vector: Of δ's shape.
        along: Tensors that ``inner`` depends on; δ itself may be among them.

    Returns:
        One tensor each, None where ``inner`` does not depend on it.
    """
    size = torch.linalg.vector_norm(vector)
    if size == 0:
        return [None] * len(along)
    reach = REACH * vector.numel() ** 0.5 / size
    sides = []
    for sign in (1, -1):
        point = (delta + sign * reach * vector).detach().requires_grad_(True)
        variables = [point if tensor is delta else tensor for tensor in along]
        sides.append(torch.autograd.grad(inner(point), variables, allow_unused=True))
    return [None if up is None or down is None else (up - down) / (2 * reach) for up, down in zip(*sides, strict=True)]
