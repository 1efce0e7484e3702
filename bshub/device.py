"""Which processor a run uses."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from bshub.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn


def pick_device(name: str) -> torch.device:
    """``auto`` takes CUDA where there is one (of several processes each its own), else the CPU.

    Raises:
        UsageError: The named device does not exist here, or lacks the double precision that the proof needs (MPS).
    """
    import torch

    if name == "auto":
        # PartialState made the process's own GPU the current one
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64)
    except Exception as error:  # torch raises AssertionError, RuntimeError, TypeError and others here
        raise UsageError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}", hint="--device cpu always works"
        ) from None
    return device


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies numbers of bfloat16 as such: else they are converted, at many times the cost."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cpu" and bool(torch.backends.mkldnn.is_available() and units)


def in_bf16(device: torch.device, half: bool = True) -> AbstractContextManager[Any]:
    """Passes in bfloat16 where ``half``; for networks of which each runs a few times: no cast of a weight is kept."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def pick_precision(name: str, model: nn.Module, device: torch.device) -> str:
    """What ``auto`` stands for: ``bf16`` where a network's passes take less time in it, else ``fp32``.

    It does not depend on how busy the machine is, so the same machine decides the same. On a CPU depthwise
    convolutions, which are little arithmetic for many numbers, decide against it: MobileNetV3 and EfficientNet took up
    to 1.65 times as long, networks without them half (wide) to four fifths (narrow).

    Args:
        name: ``auto``, ``fp32`` or ``bf16``; the latter two are given back.
        model: The network.
        device: Where it runs.

    Returns:
        ``fp32`` or ``bf16``.
    """
    if name != "auto":
        return name
    depthwise = any(1 < getattr(module, "groups", 1) == module.in_channels for module in model.modules())
    return "bf16" if has_bf16(device) and (device.type == "cuda" or not depthwise) else "fp32"
