"""Which processor a run uses."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from bshub.errors import UsageError

if TYPE_CHECKING:
    import torch


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
    """Whether matrices of bfloat16 are multiplied by units of their own, in half of the time of float32 or less.

    AVX-512's instructions alone do not count: with a small network's conversions they took up to 1.5 times as long.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and bool(torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported())
