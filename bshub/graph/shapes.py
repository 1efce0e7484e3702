"""Results of the most frequent operations on meta tensors, made without their Python kernels.

PyTorch computes the shape of a batch norm or of an element-wise operation on meta tensors in Python, 1 to 5 ms each:
most of the time of a recording. Here the same shape, strides and dtype cost one allocation. Whatever is not plainly
the common case goes the usual way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    rule = _RULES.get(func)
    if rule is None or not isinstance(args[0], Tensor) or not args[0].is_meta or not args[0].is_floating_point():
        return None
    return rule(*args)


def _same(x: Tensor, *options: Any) -> Tensor | None:
    # along an axis of one element contiguous tensors may hold any step, of which some kernels make another
    fresh = torch.empty_like(x) if x.is_contiguous() else None
    return fresh if fresh is not None and fresh.stride() == x.stride() else None


def _itself(x: Tensor, *options: Any) -> Tensor:
    return x


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    extra: Sequence[int],
    groups: int,
) -> Tensor | None:
    """``(n, out, ⌊(size + 2·padding - dilation·(kernel - 1) - 1) / stride⌋ + 1, …)``; what does not fit is not ours."""
    out, of_group, *kernel = weight.shape
    rank = len(kernel)
    fits = x.ndim == rank + 2 and x.shape[1] == of_group * groups and (bias is None or bias.shape == (out,))
    if transposed or not fits or out % groups or not x.is_contiguous() or x.dtype != weight.dtype:
        return None
    if not len(stride) == len(padding) == len(dilation) == rank:
        return None
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    return x.new_empty((x.shape[0], out, *sizes)) if min(sizes) > 0 else None


def _mean(x: Tensor, dims: Sequence[int] | None, keep: bool = False) -> Tensor | None:
    """``x`` without the axes ``dims``, or with them at size 1."""
    if not dims or not all(-x.ndim <= dim < x.ndim for dim in dims):
        return None
    reduced = {dim % x.ndim for dim in dims}
    if len(reduced) < len(dims):
        return None
    if keep:
        return x.new_empty([1 if axis in reduced else size for axis, size in enumerate(x.shape)])
    return x.new_empty([size for axis, size in enumerate(x.shape) if axis not in reduced])


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    *options: float,
) -> tuple[Tensor, ...] | None:
    """In evaluation no running statistic is written; numbers of another width are not ours."""
    if training or x.ndim < 2 or not x.is_contiguous():
        return None
    if not all(tensor is None or tensor.shape == x.shape[1:2] for tensor in (weight, bias, mean, variance)):
        return None
    saved = x.new_empty(x.shape[1])
    return torch.empty_like(x), saved, saved.clone()


def _sum(a: Tensor, b: Any, *options: Any) -> Tensor | None:
    """Operands of one dtype, the second no larger than the first."""
    if not isinstance(b, Tensor) or b.dtype != a.dtype or not b.is_meta or not a.is_contiguous():
        return None
    return torch.empty_like(a) if torch.broadcast_shapes(a.shape, b.shape) == a.shape else None


def _sum_in_place(a: Tensor, b: Any, *options: Any) -> Tensor | None:
    if not isinstance(b, Tensor) or b.dtype != a.dtype or not b.is_meta:
        return None
    return a if torch.broadcast_shapes(a.shape, b.shape) == a.shape else None


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(UNARY, _same),
    **dict.fromkeys(IN_PLACE, _itself),
    **dict.fromkeys(BINARY, _sum),
    **dict.fromkeys(BINARY_IN_PLACE, _sum_in_place),
    aten.convolution.default: _convolution,
    aten.mean.dim: _mean,
    aten.native_batch_norm.default: _batch_norm,
}
