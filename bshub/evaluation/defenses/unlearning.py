"""Gradient ascent on the clean loss, one step at a time; shared by RNP and TSBD."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.evaluation.defenses.training import logits_of


def ascent_step(student: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor | None:
    """One step that makes the cross entropy larger, in place.

    An ascent has no end of its own: a step that leaves the finite numbers is taken back.

    Args:
        student: The network, trainable.
        optimizer: Over its parameters.
        images: ``[n, c, h, w]``.
        labels: ``[n]``.

    Returns:
        The logits before the step, ``[n, classes]``; None where it was taken back.
    """
    safe = copy.deepcopy(student.state_dict())
    logits = logits_of(student, images)
    optimizer.zero_grad(set_to_none=True)
    (-F.cross_entropy(logits, labels)).backward()
    optimizer.step()
    if all(bool(tensor.isfinite().all()) for tensor in student.state_dict().values()):
        return logits.detach()
    student.load_state_dict(safe)
    return None
