"""Shortcuts for meta tensors give what PyTorch's own kernels give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bshub.graph.shapes import BINARY, BINARY_IN_PLACE, IN_PLACE, UNARY, shape_of

aten = torch.ops.aten


def described(result: Any) -> Any:
    if isinstance(result, tuple):
        return [described(item) for item in result]
    return (tuple(result.shape), result.stride(), result.dtype, result.device.type)


def layouts() -> st.SearchStrategy[torch.Tensor]:
    """Meta tensors in every layout a network makes: contiguous, permuted, expanded, sliced, channels last."""
    shape = st.lists(st.integers(1, 4), min_size=1, max_size=4)
    base = shape.map(lambda size: torch.empty(size, device="meta"))

    def vary(x: torch.Tensor) -> st.SearchStrategy[torch.Tensor]:
        return st.sampled_from(
            [x, x.flip(0).transpose(0, -1), x.unsqueeze(0).expand(3, *x.shape), x[..., ::2],
             x.to(memory_format=torch.channels_last) if x.ndim == 4 else x]
        )  # fmt: skip

    return base.flatmap(vary)


@settings(max_examples=60, deadline=None)
@example(x=torch.empty(2, 1, device="meta")[..., ::2], op=aten.hardtanh.default)  # contiguous, with a step of 2
@given(x=layouts(), op=st.sampled_from(sorted(UNARY | IN_PLACE, key=str)))
def test_one_operand(x: torch.Tensor, op: Any) -> None:
    found = shape_of(op, (x,))
    if found is None:
        assert op in UNARY and x.stride() != torch.empty(x.shape).stride()
    else:
        assert described(found) == described(op(x))


@settings(max_examples=80, deadline=None)
@given(x=layouts(), ones=st.integers(0, 15), op=st.sampled_from(sorted(BINARY | BINARY_IN_PLACE, key=str)))
def test_two_operands(x: torch.Tensor, ones: int, op: Any) -> None:
    y = torch.empty([1 if ones >> axis & 1 else size for axis, size in enumerate(x.shape)], device="meta")
    for a, b in ((x, y), (y, x), (x, 2.0)):
        found = shape_of(op, (a, b))
        if found is None:  # asked the usual way
            continue
        assert op in BINARY_IN_PLACE or a.is_contiguous()
        if op in BINARY_IN_PLACE:
            assert found is a
        else:
            assert described(found)[0] == described(op(a, b))[0]
            assert found.dtype == op(a, b).dtype


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3), (2, 3, 5)])
def test_batch_norm_in_evaluation_and_only_there(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device="meta")
    numbers = [torch.empty(3, device="meta") for _ in range(4)]
    args = (x, *numbers, False, 0.1, 1e-5)
    assert described(shape_of(aten.native_batch_norm.default, args)) == described(aten.native_batch_norm.default(*args))
    assert shape_of(aten.native_batch_norm.default, (x, *numbers, True, 0.1, 1e-5)) is None


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 2), size=st.integers(3, 9), kernel=st.integers(1, 3), stride=st.integers(1, 3),
    padding=st.integers(0, 2), dilation=st.integers(1, 2), groups=st.sampled_from([1, 2, 4]), bias=st.booleans(),
)  # fmt: skip
def test_convolution(
    rank: int, size: int, kernel: int, stride: int, padding: int, dilation: int, groups: int, bias: bool
) -> None:
    x = torch.empty([2, 4, *[size] * rank], device="meta")
    weight = torch.empty([8, 4 // groups, *[kernel] * rank], device="meta")
    number = torch.empty(8, device="meta") if bias else None
    lists = [[value] * rank for value in (stride, padding, dilation)]
    args = (x, weight, number, *lists, False, [0] * rank, groups)
    found = shape_of(aten.convolution.default, args)
    try:
        wanted = aten.convolution.default(*args)
    except RuntimeError:  # the kernel is larger than the image
        assert found is None
    else:
        assert described(found) == described(wanted)
    wrong = torch.empty([8, 4 // groups + 1, *[kernel] * rank], device="meta")
    assert shape_of(aten.convolution.default, (x, wrong, *args[2:])) is None
    assert shape_of(aten.convolution.default, (*args[:6], True, *args[7:])) is None


@settings(max_examples=40, deadline=None)
@given(x=layouts(), dims=st.lists(st.integers(-3, 3), min_size=1, max_size=3), keep=st.booleans())
def test_mean(x: torch.Tensor, dims: list[int], keep: bool) -> None:
    found = shape_of(aten.mean.dim, (x, dims, keep))
    if found is not None:
        assert described(found)[0] == described(aten.mean.dim(x, dims, keep))[0]


def test_batch_norm_of_another_width_goes_the_usual_way() -> None:
    x, numbers = torch.empty(2, 3, 4, 4, device="meta"), [torch.empty(4, device="meta") for _ in range(4)]
    assert shape_of(aten.native_batch_norm.default, (x, *numbers, False, 0.1, 1e-5)) is None


def test_real_and_whole_numbers_go_the_usual_way() -> None:
    assert shape_of(aten.relu.default, (torch.zeros(2),)) is None
    assert shape_of(aten.relu.default, (torch.zeros(2, dtype=torch.int64, device="meta"),)) is None
    assert shape_of(aten.conv2d.default, (torch.zeros(2, device="meta"),)) is None
    half = torch.empty(2, dtype=torch.float16, device="meta")
    assert shape_of(aten.add.Tensor, (torch.empty(2, device="meta"), half)) is None
