"""The proof after surgery: the small model computes what the masked original computes."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bshub.graph.trace import in_mode

FLOAT32_BOUND = 1e-5
FLOAT64_BOUND = 1e-9


@dataclass(frozen=True)
class Proof:
    """How far the small model's logits are from the masked original's.

    Attributes:
        error: ``max |small - masked| / max |masked|``.
        bound: Largest error that counts as equal.
        dtype: Precision of the comparison.
        images: Number of images compared.
    """

    error: float
    bound: float
    dtype: str
    images: int

    @property
    def holds(self) -> bool:
        """Whether the two agree (a NaN never does)."""
        return self.error <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return {**asdict(self), "holds": self.holds}


def compare(small: nn.Module, masked: nn.Module, images: Tensor) -> Proof:
    """Compare logits in float32 and, in case of doubt, in float64.

    Args:
        small: The narrowed model.
        masked: The original with the leaving slots zeroed at every consumer.
        images: Normalised batch ``[n, channels, height, width]`` of real images.

    Returns:
        The proof, which may fail; a forward run of ``small`` that fails raises its own error.
    """
    proof = _compare(small, masked, images, FLOAT32_BOUND)
    if proof.holds:
        return proof
    return _compare(copy.deepcopy(small).double(), copy.deepcopy(masked).double(), images.double(), FLOAT64_BOUND)


def _compare(small: nn.Module, masked: nn.Module, images: Tensor, bound: float) -> Proof:
    with torch.no_grad(), in_mode(small, False), in_mode(masked, False):
        ours, theirs = small(images), masked(images)
    if ours.shape != theirs.shape:
        error = float("inf")
    else:
        scale = theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny)
        error = float((ours - theirs).abs().max() / scale)
    return Proof(error, bound, str(images.dtype).removeprefix("torch."), len(images))
