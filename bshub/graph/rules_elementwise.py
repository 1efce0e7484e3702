"""Channel rules of the operations that work element by element."""

from __future__ import annotations

from bshub.graph.call import Call, Result
from bshub.graph.channels import Channels, Ints, Lane, Traveller


def elementwise(channels: Channels, call: Call, combine: str) -> Traveller:
    """Broadcasting: axes of equal size leave together; size-1 axes carry nothing.

    ``combine`` says how values meet: ``add`` (zero when all are), ``multiply`` (zero when one is) or
    ``unknown`` (never known to be zero).
    """
    lanes: list[Lane | None] = [None] * len(call.shape)
    for axis, size in enumerate(call.shape):
        if size == 1:
            continue
        present: list[Lane] = []
        foreign = False  # an operand of full size without channels
        spread = False  # an operand with values of its own, the same for all channels
        shifted_by = any(isinstance(arg, (int, float)) and arg != 0 for arg in call.args[:2])
        for operand in call.travellers():
            own = axis - (len(call.shape) - len(operand.shape))
            if own < 0 or operand.shape[own] == 1:
                constant = all(side == 1 for side in operand.shape)
                spread, shifted_by = spread or not constant, shifted_by or constant
            elif (lane := operand.lanes[own]) is None:
                foreign = True
            else:
                present.append(lane)
        for lane in present[1:]:
            channels.couple(present[0], lane)
        if foreign:
            for lane in present:
                channels.pin(lane, call.reason("meets an axis without channels"))
        elif present:
            fresh = combine == "unknown" or (combine == "add" and spread)
            lanes[axis] = Lane(present[0].slots, _combined(channels, combine, present, fresh, shifted_by))
    return Traveller(call.shape, lanes)


def _combined(channels: Channels, combine: str, present: list[Lane], fresh: bool, shifted_by: bool) -> Ints:
    streams = [lane.values for lane in present]
    if fresh:
        return channels.new_values(len(streams[0]))
    if combine == "multiply":  # what a gate scales is alive or not by itself
        streams = [stream for stream in streams if not channels.is_gate(stream)] or streams
    if len(streams) > 1:
        return channels.derive(combine, *streams)
    return channels.derive("offset", streams[0]) if combine == "add" and shifted_by else streams[0]


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


def divide(channels: Channels, call: Call) -> Traveller:
    """Division by a number keeps zeros; by a tensor nothing is known."""
    return same(channels, call) if len(call.travellers()) == 1 else elementwise(channels, call, "unknown")


def plain(channels: Channels, call: Call) -> Result:
    """A new tensor whose sizes stand in the call."""
    return call.everything_plain()


def refuse(channels: Channels, call: Call) -> Result:
    """Whatever has no rule keeps all channels it touches in place."""
    for traveller in call.travellers():
        for lane in traveller.lanes:
            channels.pin(lane, call.reason("has no channel rule"))
    return call.everything_plain()
