"""Batch-norm-statistics pruning, BNP (Zheng et al., NeurIPS 2022, "Pre-activation Distributions Expose Backdoor
Neurons", the second of its two detectors).

The running statistics ``(μ, σ²)`` of a batch norm were taken while poisoned images passed; clean images give
``(μ̂, σ̂²)``. Of a channel with Gaussian pre-activations the divergence is

    KL(N(μ̂, σ̂²) ‖ N(μ, σ²)) = log(σ/σ̂) + (σ̂² + (μ̂ - μ)²) / (2σ²) - 1/2

and channels above mean + u·std of their layer are pruned (γ = 0, the shift stays). Official value: u 3.

Deviations: the statistics are those of all clean images (the code takes one batch), and both variances get the
batch norm's ε, without which one dead channel makes the whole layer's mean infinite. There is nothing to scale by
effort, and the seed has no say. The version in BackdoorBench forgets the root in ``log(σ/σ̂)``; this one has it.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bshub.clean import CleanImages
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.masking import scaled_norms


def bnp(model: nn.Module, clean: CleanImages, settings: DefenseSettings, *, u: float = 3.0) -> nn.Module:
    """Prune the channels whose clean statistics are furthest from the recorded ones.

    Args:
        model: The network; not changed.
        clean: The clean images.
        settings: Batch size.
        u: Standard deviations above the layer's mean.

    Returns:
        The pruned copy.

    Raises:
        InconclusiveError: There is no batch norm with a scale.
    """
    clean.drain()
    defended = copy.deepcopy(model).eval()
    moments = input_moments(defended, scaled_norms(defended), clean, settings)
    for name, (mean, variance) in moments.items():
        norm = defended.get_submodule(name)
        running_mean, running_variance = norm.running_mean, norm.running_var
        if not isinstance(running_mean, Tensor) or not isinstance(running_variance, Tensor):
            continue  # it keeps no statistics
        eps = float(norm.eps)  # type: ignore[arg-type]
        divergence = gaussian_kl(mean, variance + eps, running_mean.double(), running_variance.double() + eps)
        with torch.no_grad():
            defended.get_parameter(f"{name}.weight")[outliers(divergence, u)] = 0
    return defended


def gaussian_kl(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """``KL(N(mean, variance) ‖ N(other_mean, other_variance))``, elementwise.

    Args:
        mean: ``[channels]``.
        variance: ``[channels]``, above zero.
        other_mean: ``[channels]``.
        other_variance: ``[channels]``, above zero.

    Returns:
        ``[channels]``, in nats.
    """
    ratio = variance / other_variance
    return (ratio - ratio.log() - 1 + (mean - other_mean).square() / other_variance) / 2


def outliers(values: Tensor, u: float) -> Tensor:
    """Which values ``[channels]`` lie above their mean + u · standard deviation.

    Args:
        values: ``[channels]``.
        u: In standard deviations.

    Returns:
        Truth values ``[channels]``.
    """
    return values > values.mean() + u * values.std()


def input_moments(
    model: nn.Module, names: list[str], clean: CleanImages, settings: DefenseSettings
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of what arrives at some modules, over images and positions.

    Args:
        model: The network; its hooks are removed again.
        names: Modules with channels on axis 1.
        clean: The clean images.
        settings: Batch size and progress.

    Returns:
        Module → ``([channels], [channels])``, double precision; modules that did not run are missing.
    """
    seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {name: [] for name in names}
    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(_note, seen[name])) for name in names]
    try:
        with torch.no_grad():
            for images, _ in clean.batches(settings.batch_size):
                model(images)
                settings.progress(1)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _pooled(batches) for name, batches in seen.items() if batches}


def _note(batches: list[tuple[int, Tensor, Tensor]], module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Count, mean and variance of one batch ``(n, channels, ...)``."""
    values = inputs[0]
    axes = [axis for axis in range(values.ndim) if axis != 1]
    variance, mean = torch.var_mean(values.float(), axes, correction=0)
    batches.append((values.numel() // values.shape[1], mean.double(), variance.double()))


def _pooled(batches: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all batches together: the variance within them plus that of their means."""
    total = sum(count for count, _, _ in batches)
    mean = torch.stack([count * part for count, part, _ in batches]).sum(0) / total
    squares = torch.stack([count * (variance + (part - mean).square()) for count, part, variance in batches]).sum(0)
    return mean, squares / max(1, total - 1)
