"""Results of the most frequent operations on meta tensors, made without their Python kernels.

PyTorch computes the shape of a batch norm or of an element-wise operation on meta tensors in Python, 1 to 5 ms each:
most of the time of a recording. Here the same shape, strides and dtype cost one allocation. Whatever is not plainly
the common case goes the usual way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

UNARY = {
    op.default
    for op in (
        aten.relu, aten.silu, aten.sigmoid, aten.hardswish, aten.hardsigmoid, aten.hardtanh, aten.gelu, aten.mish,
        aten.leaky_relu, aten.tanh,
    )
}  # fmt: skip
IN_PLACE = {
    op.default
    for op in (aten.relu_, aten.silu_, aten.sigmoid_, aten.hardswish_, aten.hardsigmoid_, aten.hardtanh_, aten.mish_)
}
BINARY = {aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor}
BINARY_IN_PLACE = {aten.add_.Tensor, aten.mul_.Tensor}


def shape_of(func: Any, args: tuple[Any, ...]) -> Any:
    """The meta result of ``func(*args)``, or None where it must be asked itself."""
    first = args[0] if args else None
    if not isinstance(first, Tensor) or not first.is_meta or not first.is_floating_point():
        return None
    if func in UNARY:
        return torch.empty_like(first)
    if func in IN_PLACE:
        return first
    if func in BINARY or func in BINARY_IN_PLACE:
        return _binary(func, first, args[1])
    if (
        func is aten.native_batch_norm.default and args[5] is False
    ):  # evaluation: nothing is written to the running statistics
        saved = first.new_empty(first.shape[1])
        return torch.empty_like(first), saved, saved.clone()
    return None


def _binary(func: Any, a: Tensor, b: Any) -> Tensor | None:
    if not isinstance(b, Tensor) or b.dtype != a.dtype or not b.is_meta:
        return None
    if torch.broadcast_shapes(a.shape, b.shape) != a.shape:
        return None
    if func in BINARY_IN_PLACE:
        return a
    return torch.empty_like(a) if a.is_contiguous() else None
