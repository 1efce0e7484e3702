"""Which processor a run uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bshub.errors import UsageError

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        UsageError: The named device does not exist here.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # torch raises AssertionError, RuntimeError and others here
        raise UsageError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}", hint="--device cpu always works"
        ) from None
    return device
