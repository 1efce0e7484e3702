"""Channel rules of the operations that make new channels: convolution, batch norm, linear, matrix products."""

from __future__ import annotations

import numpy as np

from bshub.graph.call import Call, Result
from bshub.graph.channels import NO_VALUE, Channels, Lane, Traveller


def convolution(channels: Channels, call: Call) -> Traveller:
    """Convolution of any rank, grouped or transposed.

    ``x (n, in, ...)``, ``W (out, in/groups, ...)``; transposed ``W (in, out/groups, ...)``.

    * groups 1: the input's channels are read by ``W``'s input axis; the output's are ``W``'s output axis.
    * depthwise (one input channel per group): output ``o`` leaves with input ``o // multiplier``.
    * grouped: the k-th channels of all groups leave together, so that the groups stay equal.
    """
    x, weight, bias = call.args[0], call.args[1], call.args[2]
    transposed, groups = call.args[6], call.args[8]
    along: list[Lane | None] = [None] * (len(call.shape) - 2)
    for axis, lane in enumerate(x.lanes):
        if axis == 1 or lane is None or _only_parameters(lane):
            continue
        if axis >= 2 and _refillable(channels, call, axis, lane):
            along[axis - 2] = Lane(lane.slots, channels.new_values(len(lane)))
        else:
            channels.pin(lane, call.reason("slides along the channels"))
    for lane in weight.lanes[2:]:  # a kernel computed from channels
        if lane is not None and not _only_parameters(lane):
            channels.pin(lane, call.reason("slides along the channels"))
    source, produced, consumed = x.lanes[1], weight.lanes[0], weight.lanes[1]
    out = call.shape[1]
    if groups == 1:
        if transposed:
            produced, consumed = consumed, produced
        _contract(channels, call, source, consumed)
        lane = produced and Lane(produced.slots, channels.new_values(out))
    elif weight.shape[1] == 1:  # depthwise; transposed or not, W's first axis follows the input or the output
        lane = _depthwise(channels, call, source, produced, groups, out)
    elif transposed:
        _contract(channels, call, source, produced)
        for side in (source, produced):
            _tie_groups(channels, side, groups)
        lane = consumed and Lane(np.tile(consumed.slots, groups), channels.new_values(out))
    else:
        _tie_groups(channels, source, groups)
        first = source and source.take(np.arange(len(source) // groups))
        _contract(channels, call, first, consumed)
        if source is not None and consumed is not None:
            channels.reads.append((source.slots, source.values))
        _tie_groups(channels, produced, groups)
        lane = produced and Lane(produced.slots, channels.new_values(out))
    if bias is not None and bias.lanes[0] is not None:
        _follow(channels, call, lane, bias.lanes[0])
    return Traveller(call.shape, [None, lane, *along])


def _refillable(channels: Channels, call: Call, axis: int, lane: Lane) -> bool:
    """Whether channels may leave the axis that a convolution slides along (the gates of ECA).

    Its kernel spans neighbours, so the places of channels that left must be zeros while it slides: hooks around the
    module put them in and take them out again. That needs a module that does nothing else, steps of one and an
    output as wide as the input.
    """
    stride, transposed = call.args[3], call.args[6]
    step = stride[axis - 2] if len(stride) > 1 else stride[0]
    same_width = axis < len(call.shape) and call.shape[axis] == len(lane)
    known = channels.refills.get(call.module)
    if not (call.whole and same_width and step == 1 and not transposed) or (known and len(known[1]) != len(lane)):
        return False
    if known:  # the module runs twice: one set of places for both
        channels.couple(known[1], lane)
    channels.refills[call.module] = (axis, lane)
    channels.zero_reads.append((lane.slots, lane.values))
    return True


def _depthwise(
    channels: Channels, call: Call, source: Lane | None, weight: Lane | None, groups: int, out: int
) -> Lane | None:
    if source is None or weight is None:
        channels.pin(source, call.reason("has weights without channels"))
        channels.pin(weight, call.reason("reads an input without channels"))
        return None
    spread = source.take(np.repeat(np.arange(groups), out // groups))
    own = weight if len(weight) == out else weight.take(np.repeat(np.arange(groups), out // groups))
    channels.couple(spread, own)
    return Lane(spread.slots, channels.derive("offset", spread.values))


def batch_norm(channels: Channels, call: Call) -> Result:
    """``γ (x - mean) / sqrt(var + ε) + β`` per channel: all five leave together."""
    x = call.args[0]
    affine = [arg for arg in call.args[1:5] if isinstance(arg, Traveller)]
    lanes = list(x.lanes)
    uses_batch = isinstance(call.arg(5), bool) and call.arg(5)
    for axis, lane in enumerate(lanes):
        if axis != 1 and lane is not None and uses_batch:
            channels.pin(lane, call.reason("takes statistics over the channels"))
            lanes[axis] = None
    for tensor in affine:
        if tensor.lanes[0] is not None:
            _follow(channels, call, lanes[1], tensor.lanes[0])
    if lanes[1] is not None:
        lanes[1] = Lane(lanes[1].slots, channels.derive("offset", lanes[1].values))
    return call.first(Traveller(x.shape, lanes))


def addmm(channels: Channels, call: Call) -> Traveller:
    """``bias + a @ b``."""
    result = _product(channels, call, call.args[1], call.args[2])
    bias = call.args[0].lanes[-1]
    if bias is not None:
        _follow(channels, call, result.lanes[-1], bias)
    return result


def matmul(channels: Channels, call: Call) -> Traveller:
    """``a @ b`` with at most one batch axis."""
    return _product(channels, call, call.args[0], call.args[1])


def linear(channels: Channels, call: Call) -> Traveller:
    """``x @ Wᵀ + bias``, ``W (out, in)``."""
    x, weight = call.args[0], call.args[1]
    flipped = Traveller(weight.shape[::-1], weight.lanes[::-1])
    result = _product(channels, call, x, flipped)
    bias = call.arg(2)
    if bias is not None and bias.lanes[0] is not None:
        _follow(channels, call, result.lanes[-1], bias.lanes[0])
    return result


def _product(channels: Channels, call: Call, a: Traveller, b: Traveller) -> Traveller:
    _contract(channels, call, a.lanes[-1], b.lanes[-2])
    lanes: list[Lane | None] = [*a.lanes[:-1], b.lanes[-1]]
    for axis in range(len(call.shape) - 2):  # batch axes of a bmm
        left, right = lanes[axis], b.lanes[axis] if len(b.shape) == len(a.shape) else None
        if left is not None and right is not None:
            channels.couple(left, right)
        for lane in (left, right):
            if (left is None) != (right is None) and len(b.shape) == len(a.shape):
                channels.pin(lane, call.reason("meets an axis without channels"))
                lanes[axis] = None
    return Traveller(call.shape, [lane and Lane(lane.slots, channels.new_values(len(lane))) for lane in lanes])


def _contract(channels: Channels, call: Call, data: Lane | None, weight: Lane | None) -> None:
    """Sum over an axis: allowed to shrink where one side is weights."""
    if data is None or weight is None:
        channels.pin(data, call.reason("sums over the channels without weights"))
        channels.pin(weight, call.reason("reads an input without channels"))
    elif _only_parameters(weight):
        channels.read(data, weight)
    elif _only_parameters(data):
        channels.read(weight, data)
    else:
        channels.couple(data, weight)
        channels.pin(data, call.reason("sums over the channels of two activations"))


def _follow(channels: Channels, call: Call, lane: Lane | None, parameter: Lane) -> None:
    """A per-channel parameter leaves with the channels it belongs to."""
    if lane is None:
        channels.pin(parameter, call.reason("is applied to an axis without channels"))
    else:
        channels.couple(lane, parameter)


def _tie_groups(channels: Channels, lane: Lane | None, groups: int) -> None:
    if lane is None:
        return
    rows = np.arange(len(lane)).reshape(groups, -1)
    for row in rows[1:]:
        channels.couple(lane.take(rows[0]), lane.take(row))


def _only_parameters(lane: Lane) -> bool:
    return bool((lane.values == NO_VALUE).all())
