"""timm's ``feature_info`` where a level names no module: the network itself is asked what it gives.

Most levels name the module that makes them, and its width is known from the recorded run (``mirrors.py``). Some name a
stage that is no module, or the whole network. ``forward_intermediates`` then runs on tensors without data: where the
original gives what its ``feature_info`` promises, the narrowed network's answer is the new promise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

Levels = list[dict[str, Any]]


def asked_levels(model: nn.Module, small: nn.Module, input_size: tuple[int, int, int]) -> Levels | None:
    """The narrowed network's ``feature_info``, where only a run can tell it.

    Args:
        model: The original.
        small: The narrowed network, which works.
        input_size: ``(channels, height, width)``.

    Returns:
        The records with their new ``num_chs``; None where nothing is to be changed or nothing can be told.
    """
    info = getattr(small, "feature_info", None)
    if not (isinstance(info, list) and all(isinstance(level, dict) for level in info)):
        return None
    modules = dict(model.named_modules())
    if all(level.get("module") and level["module"] in modules for level in info):
        return None
    promised: Any = model.feature_info
    before, after = _given(model, input_size), _given(small, input_size)
    if before is None or after is None or before != [level.get("num_chs") for level in promised]:
        return None
    renewed = [{**level, "num_chs": width} for level, width in zip(info, after, strict=True)]
    return renewed if renewed != info else None


def _given(model: Any, input_size: tuple[int, int, int]) -> list[int] | None:
    """Channels of each intermediate; None where the network has no such function or it fails without data."""
    try:
        device = next(model.parameters()).device
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            images = torch.empty(2, *input_size, device=device)
            return [int(level.shape[1]) for level in model.forward_intermediates(images, intermediates_only=True)]
    except Exception:  # somebody else's code on tensors it may not know
        return None
