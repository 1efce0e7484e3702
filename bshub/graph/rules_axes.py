"""Channel rules of the operations that work over axes: pooling, sums, softmax, normalisation over channels."""

from __future__ import annotations

from collections.abc import Sequence

from bshub.graph.call import Call, Result
from bshub.graph.channels import Channels, Lane, Traveller


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
