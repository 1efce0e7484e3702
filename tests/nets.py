"""Small real networks for the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomize_batch_norm(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine numbers as a trained net has them, in place: fresh 0/1 would hide wrong surgery."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            mean.copy_(torch.randn(mean.shape, generator=generator) * 0.2)
            var.copy_(torch.rand(var.shape, generator=generator) + 0.5)
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(weight, Tensor) and isinstance(bias, Tensor):
                weight.data.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
                bias.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval()
