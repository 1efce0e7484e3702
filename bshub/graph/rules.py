"""``OP_RULES``: how each ATen operation carries channels. One line per operation; none is skipped silently.

A rule takes the bookkeeping and a :class:`Call` and returns the traveller(s) of the result. It couples, pins
or reads the lanes it meets. An operation without a rule pins every channel it touches, with its name and the
module's, so that nothing is removed there: refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from bshub.graph.call import Call, Result
from bshub.graph.channels import Channels, Lane, Traveller
from bshub.graph.rules_mixing import addmm, batch_norm, convolution, linear, matmul
from bshub.graph.rules_shape import (
    cat,
    expand,
    permute,
    select,
    slice_,
    split,
    squeeze,
    stack,
    transpose,
    unbind,
    unsqueeze,
    view,
)

Rule = Callable[[Channels, Call], Result]


def elementwise(channels: Channels, call: Call, combine: str) -> Traveller:
    """Broadcasting: axes of equal size leave together; size-1 axes carry nothing.

    ``combine`` says how values meet: ``add`` (zero when all are), ``multiply`` (zero when one is) or
    ``unknown`` (never known to be zero).
    """
    operands = call.travellers()
    rank = len(call.shape)
    lanes: list[Lane | None] = [None] * rank
    for axis, size in enumerate(call.shape):
        if size == 1:
            continue
        present: list[Lane] = []
        foreign = False  # an operand of full size without channels, or one that is broadcast
        broadcast = any(isinstance(arg, (int, float)) and arg != 0 for arg in call.args[:2])
        scalar_only = True
        for operand in operands:
            own = axis - (rank - len(operand.shape))
            if own < 0 or operand.shape[own] == 1:
                broadcast, scalar_only = True, scalar_only and not any(s > 1 for s in operand.shape)
                continue
            lane = operand.lanes[own]
            if lane is None:
                foreign = True
            else:
                present.append(lane)
        if not present:
            continue
        for lane in present[1:]:
            channels.couple(present[0], lane)
        if foreign:
            for lane in present:
                channels.pin(lane, call.reason("meets an axis without channels"))
            continue
        values = present[0].values
        if combine == "unknown" or (combine == "add" and broadcast and not scalar_only):
            values = channels.new_values(len(values))
        elif len(present) > 1:
            streams = [lane.values for lane in present]
            if combine == "multiply":  # what a gate scales is alive or not by itself
                streams = [stream for stream in streams if not channels.is_gate(stream)] or streams
            values = channels.derive(combine, *streams)
        elif combine == "add" and broadcast:
            values = channels.derive("offset", values)
        lanes[axis] = Lane(present[0].slots, values)
    return Traveller(call.shape, lanes)


def same(channels: Channels, call: Call) -> Traveller:
    """Element by element, with f(0) = 0: the result travels as the first operand did."""
    return Traveller(call.shape, call.travellers()[0].lanes)


def shifted(channels: Channels, call: Call) -> Traveller:
    """Element by element, with f(0) ≠ 0: a zero becomes a constant."""
    lanes = [lane and Lane(lane.slots, channels.derive("offset", lane.values)) for lane in call.travellers()[0].lanes]
    return Traveller(call.shape, lanes)


def gate(channels: Channels, call: Call) -> Traveller:
    """A bounded factor (sigmoid and its kin): whatever it multiplies decides whether a slot is alive."""
    lanes = [lane and Lane(lane.slots, channels.gate(lane.values)) for lane in call.travellers()[0].lanes]
    return Traveller(call.shape, lanes)


def spatial(channels: Channels, call: Call) -> Result:
    """Pooling, padding, resizing: the first two axes pass, the others must not carry channels."""
    source = call.travellers()[0]
    lanes: list[Lane | None] = [None] * len(source.shape)
    for axis, lane in enumerate(source.lanes):
        if lane is None:
            continue
        if axis < 2 and call.first_shape[axis] == source.shape[axis]:
            lanes[axis] = lane
        else:
            channels.pin(lane, call.reason("works across the channels"))
    return call.first(Traveller(call.first_shape, lanes))


def reduction(channels: Channels, call: Call) -> Result:
    """Sum, mean, maximum over axes: the reduced ones must not carry channels."""
    source = call.travellers()[0]
    rank = len(source.shape)
    dims = call.arg(1, None)
    listed: Sequence[int] = (
        range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    )
    reduced = {dim % rank for dim in listed}
    kept = len(call.first_shape) == rank
    lanes: list[Lane | None] = []
    for axis, lane in enumerate(source.lanes):
        if axis in reduced:
            channels.pin(lane, call.reason("sums over the channels"))
            if kept:
                lanes.append(None)
        else:
            lanes.append(lane)
    return call.first(Traveller(call.first_shape, lanes))


def along(channels: Channels, call: Call) -> Traveller:
    """Softmax, cumulative sums: the axis they run along must not carry channels."""
    source = call.travellers()[0]
    lanes = list(source.lanes)
    axis = call.arg(1) % len(lanes)
    channels.pin(lanes[axis], call.reason("runs along the channels"))
    lanes[axis] = None
    return Traveller(call.shape, [lane and Lane(lane.slots, channels.gate(lane.values)) for lane in lanes])


def layer_norm(channels: Channels, call: Call) -> Result:
    """Statistics over the last axes: removal would change them."""
    source, *affine = call.travellers()
    first = len(source.shape) - len(call.arg(1))
    for lane in (*source.lanes[first:], *(lane for weight in affine for lane in weight.lanes)):
        channels.pin(lane, call.reason("normalises over the channels"))
    return call.first(Traveller(source.shape, [*source.lanes[:first], *[None] * len(call.arg(1))]))


def group_norm(channels: Channels, call: Call) -> Result:
    """Statistics over groups of channels: removal would change them."""
    source, *affine = call.travellers()
    for lane in (source.lanes[1], *(weight.lanes[0] for weight in affine)):
        channels.pin(lane, call.reason("normalises over the channels"))
    return call.first(Traveller.plain(source.shape))


def copy_(channels: Channels, call: Call) -> Result:
    """``target.copy_(source)``: the source travels on; what the target carried before leaves together with it."""
    target, source = call.args[0], call.args[1]
    if source.shape != target.shape:
        return refuse(channels, call)
    for before, lane in zip(target.lanes, source.lanes, strict=True):
        if before is not None and lane is not None:
            channels.couple(before, lane)
        elif before is not None or lane is not None:
            channels.pin(before or lane, call.reason("meets an axis without channels"))
    return Traveller(call.shape, list(source.lanes))


def like(channels: Channels, call: Call) -> Traveller:
    """A new tensor in the shape of another (a dropout mask): it only scales or fills, and takes the shape along."""
    source = call.travellers()[0]
    return Traveller(
        call.shape, [lane and Lane(lane.slots, channels.gate(channels.new_values(len(lane)))) for lane in source.lanes]
    )


def plain(channels: Channels, call: Call) -> Result:
    """A new tensor whose sizes stand in the call."""
    return call.everything_plain()


def divide(channels: Channels, call: Call) -> Traveller:
    """Division by a number keeps zeros; by a tensor nothing is known."""
    return same(channels, call) if len(call.travellers()) == 1 else elementwise(channels, call, "unknown")


def refuse(channels: Channels, call: Call) -> Result:
    """Whatever has no rule keeps all channels it touches in place."""
    for traveller in call.travellers():
        for lane in traveller.lanes:
            channels.pin(lane, call.reason("has no channel rule"))
    return call.everything_plain()


add = partial(elementwise, combine="add")
multiply = partial(elementwise, combine="multiply")
unknown = partial(elementwise, combine="unknown")

OP_RULES: dict[str, Rule] = {
    # mixing: the channels of one axis become new ones
    "convolution": convolution,
    "native_batch_norm": batch_norm,
    "_native_batch_norm_legit": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm,
    "cudnn_batch_norm": batch_norm,
    "_batch_norm_with_update": batch_norm,
    "addmm": addmm,
    "mm": matmul,
    "bmm": matmul,
    "linear": linear,
    # element by element over several tensors
    "add": add,
    "sub": add,
    "rsub": add,
    "maximum": add,
    "minimum": add,
    "mul": multiply,
    "div": divide,
    "where": unknown,
    "pow": unknown,
    # element by element, f(0) = 0
    "relu": same,
    "relu6": same,
    "hardtanh": same,
    "silu": same,
    "gelu": same,
    "hardswish": same,
    "mish": same,
    "leaky_relu": same,
    "elu": same,
    "tanh": same,
    "sqrt": same,
    "abs": same,
    "neg": same,
    "clone": same,
    "copy": copy_,
    "detach": same,
    "alias": same,
    "lift_fresh": same,
    "_to_copy": same,
    "contiguous": same,
    "native_dropout": lambda channels, call: call.first(same(channels, call)),
    "bernoulli": same,
    # new tensors
    "empty_like": like,
    "zeros_like": like,
    "ones_like": like,
    "rand_like": like,
    "randn_like": like,
    "empty": plain,
    "new_empty": plain,
    "new_zeros": plain,
    "new_ones": plain,
    "new_full": plain,
    "zeros": plain,
    "ones": plain,
    "full": plain,
    "arange": plain,
    # element by element, f(0) ≠ 0
    "sigmoid": gate,
    "hardsigmoid": gate,
    "softplus": shifted,
    "exp": shifted,
    "clamp": shifted,
    "clamp_min": shifted,
    "rsqrt": shifted,
    "reciprocal": shifted,
    # space only
    "max_pool2d_with_indices": spatial,
    "avg_pool2d": spatial,
    "_adaptive_avg_pool2d": spatial,
    "adaptive_max_pool2d": spatial,
    "constant_pad_nd": spatial,
    "reflection_pad2d": spatial,
    "replication_pad2d": spatial,
    "upsample_nearest2d": spatial,
    "upsample_bilinear2d": spatial,
    "upsample_bicubic2d": spatial,
    "_upsample_bilinear2d_aa": spatial,
    "_upsample_bicubic2d_aa": spatial,
    # over an axis
    "mean": reduction,
    "sum": reduction,
    "amax": reduction,
    "amin": reduction,
    "var": reduction,
    "var_mean": reduction,
    "max": reduction,
    "_softmax": along,
    "_log_softmax": along,
    "cumsum": along,
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
    # moving positions
    "view": view,
    "_unsafe_view": view,
    "reshape": view,
    "permute": permute,
    "transpose": transpose,
    "t": transpose,
    "expand": expand,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "cat": cat,
    "stack": stack,
    "split": split,
    "split_with_sizes": split,
    "unbind": unbind,
    "slice": slice_,
    "select": select,
}
