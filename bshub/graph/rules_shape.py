"""Channel rules of the operations that move positions: reshape, permute, concatenate, cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from bshub.graph.call import Call, Result
from bshub.graph.channels import Channels, Ints, Lane, Traveller


def view(channels: Channels, call: Call) -> Traveller:
    """Reshape. Axes are matched in blocks of equal size, and each block is merged and cut again.

    C x H x W merged into one axis keeps C, as blocks of positions. One channel axis cut into ``(a, C/a)``
    keeps the inner axis (the one that code computes from the shape; ``-1`` in the call says otherwise) and
    couples along the other, so that a channel shuffle, split attention or heads stay rectangular.
    """
    source = call.args[0]
    asked = call.arg(1, [])
    lanes: list[Lane | None] = [None] * len(call.shape)
    for old, new in _blocks(source.shape, call.shape):
        merged = _merge(channels, call, [(source.shape[i], source.lanes[i]) for i in old])
        if merged is None:
            continue
        sizes = [call.shape[i] for i in new]
        wild = [k for k, i in enumerate(new) if i < len(asked) and asked[i] == -1]
        for k, lane in _cut(channels, merged, sizes, wild[0] if wild else None):
            lanes[new[k]] = lane
    return Traveller(call.shape, lanes)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes with equal products, left to right."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a: list[int] = []
        b: list[int] = []
        left = right = 1
        while not a or not b or left != right:
            if (left <= right or j >= len(new)) and i < len(old):
                left, i = left * old[i], i + 1
                a.append(i - 1)
            elif j < len(new):
                right, j = right * new[j], j + 1
                b.append(j - 1)
            else:
                break
        blocks.append((a, b))
    return blocks


def _merge(channels: Channels, call: Call, axes: list[tuple[int, Lane | None]]) -> Lane | None:
    """One lane over the flattened axes; two channel axes at once cannot be told apart and are pinned."""
    carrying = [k for k, (_, lane) in enumerate(axes) if lane is not None]
    if not carrying:
        return None
    if len(carrying) > 1:
        for _, lane in axes:
            channels.pin(lane, call.reason("flattens two channel axes into one"))
        return None
    lane = axes[carrying[0]][1]
    assert lane is not None
    outer = int(np.prod([size for size, _ in axes[: carrying[0]]]))
    inner = int(np.prod([size for size, _ in axes[carrying[0] + 1 :]]))
    return lane.take(np.tile(np.repeat(np.arange(len(lane)), inner), outer))


def _cut(channels: Channels, lane: Lane, sizes: list[int], wild: int | None) -> list[tuple[int, Lane]]:
    """Cut a lane into axes; returns the axis that carries the channels."""
    grid = np.arange(len(lane)).reshape(sizes)
    slots = lane.slots[grid]
    varying = [k for k in range(len(sizes)) if sizes[k] > 1 and (slots != np.take(slots, [0], axis=k)).any()]
    if not varying:
        return []
    keep = varying[-1]
    if len(varying) > 1 and wild is not None and wild in varying:
        keep = wild
    table = np.moveaxis(grid, keep, -1).reshape(-1, sizes[keep])  # (others, kept)
    first = lane.take(table[0])
    if (slots.size, len(varying)) != (sizes[keep], 1) and len(varying) > 1:
        for row in table[1:]:
            channels.couple(first, lane.take(row))
    rows = np.unique(lane.values[table], axis=0)
    values = first.values if len(rows) == 1 else channels.derive("add", *rows)
    return [(keep, Lane(first.slots, values))]


def permute(channels: Channels, call: Call) -> Traveller:
    """Axes in a new order."""
    source = call.args[0]
    return Traveller(call.shape, [source.lanes[axis] for axis in call.args[1]])


def transpose(channels: Channels, call: Call) -> Traveller:
    """Two axes swapped; ``t`` swaps the only two."""
    lanes = list(call.args[0].lanes)
    if len(lanes) > 1:
        a, b = call.arg(1, 0), call.arg(2, 1)
        lanes[a], lanes[b] = lanes[b], lanes[a]
    return Traveller(call.shape, lanes)


def expand(channels: Channels, call: Call) -> Traveller:
    """Size-1 axes repeated, new axes in front."""
    source = call.args[0]
    return Traveller(call.shape, [*[None] * (len(call.shape) - len(source.shape)), *source.lanes])


def repeat(channels: Channels, call: Call) -> Traveller:
    """Copies laid one after another along each axis."""
    source, times = call.args[0], call.args[1]
    ahead = len(times) - len(source.shape)
    lanes = [lane and lane.take(np.tile(np.arange(len(lane)), times[ahead + k])) for k, lane in enumerate(source.lanes)]
    return Traveller(call.shape, [*[None] * ahead, *lanes])


def pixel_shuffle(channels: Channels, call: Call) -> Traveller:
    """``(n, c·r², h, w)`` → ``(n, c, h·r, w·r)``: the r² channels of one result leave together."""
    source, factor = call.args[0], call.args[1]
    lane = source.lanes[1]
    if lane is not None:
        table = np.arange(len(lane)).reshape(-1, factor * factor)  # (c, r²)
        first = lane.take(table[:, 0])
        for column in table.T[1:]:
            channels.couple(first, lane.take(column))
        lane = Lane(first.slots, channels.derive("add", *lane.values[table.T]))
    return Traveller(call.shape, [source.lanes[0], lane, None, None])


def pixel_unshuffle(channels: Channels, call: Call) -> Traveller:
    """``(n, c, h·r, w·r)`` → ``(n, c·r², h, w)``: each channel becomes r² neighbours."""
    source, factor = call.args[0], call.args[1]
    lane = source.lanes[1]
    spread = lane and lane.take(np.repeat(np.arange(len(lane)), factor * factor))
    return Traveller(call.shape, [source.lanes[0], spread, None, None])


def squeeze(channels: Channels, call: Call) -> Traveller:
    """Size-1 axes dropped; they carry nothing."""
    source = call.args[0]
    rank = len(source.shape)
    dims = call.arg(1, list(range(rank)))
    listed = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)}
    keep = [axis for axis in range(rank) if axis not in listed or source.shape[axis] != 1]
    return Traveller(call.shape, [source.lanes[axis] for axis in keep])


def unsqueeze(channels: Channels, call: Call) -> Traveller:
    """A new size-1 axis."""
    lanes = list(call.args[0].lanes)
    axis = call.args[1]
    lanes.insert(axis if axis >= 0 else axis + len(lanes) + 1, None)
    return Traveller(call.shape, lanes)


def cat(channels: Channels, call: Call) -> Traveller:
    """Lanes joined along one axis; the other axes leave together."""
    parts = [part for part in call.args[0] if part.shape != (0,)]
    axis = call.arg(1, 0) % len(call.shape)
    lanes = _together(channels, call, parts, skip=axis)
    if any(part.lanes[axis] is not None for part in parts):
        filled = [part.lanes[axis] or _fixed(channels, call, part.shape[axis]) for part in parts]
        slots = np.concatenate([lane.slots for lane in filled])
        lanes[axis] = Lane(slots, np.concatenate([lane.values for lane in filled]))
    return Traveller(call.shape, lanes)


def _fixed(channels: Channels, call: Call, size: int) -> Lane:
    """Positions without channels among others that have them: variables of their own that stay."""
    lane = Lane(channels.new_variables(size), channels.new_values(size))
    channels.pin(lane, call.reason("joins positions without channels"))
    return lane


def _together(channels: Channels, call: Call, parts: list[Traveller], skip: int | None) -> list[Lane | None]:
    lanes: list[Lane | None] = [None] * len(parts[0].shape)
    for axis in range(len(lanes)):
        if axis == skip:
            continue
        present = [lane for part in parts if (lane := part.lanes[axis]) is not None]
        if not present:
            continue
        for lane in present[1:]:
            channels.couple(present[0], lane)
        if len(present) < len(parts):
            channels.pin(present[0], call.reason("joins positions without channels"))
            continue
        lanes[axis] = Lane(present[0].slots, channels.derive("add", *(lane.values for lane in present)))
    return lanes


def stack(channels: Channels, call: Call) -> Traveller:
    """A new axis over tensors of one shape, whose axes leave together."""
    lanes = _together(channels, call, call.args[0], skip=None)
    axis = call.arg(1, 0) % len(call.shape)
    return Traveller(call.shape, [*lanes[:axis], None, *lanes[axis:]])


def split(channels: Channels, call: Call) -> Result:
    """Consecutive parts. Equal parts stay equal, as one number in code says; other sizes are attributes."""
    source = call.args[0]
    axis = call.arg(2, call.kwargs.get("dim", 0)) % len(source.shape)
    sizes = [shape[axis] for shape in call.result_shape]
    lane = source.lanes[axis]
    starts = np.cumsum([0, *sizes])
    cut = [lane and lane.take(np.arange(a, b)) for a, b in pairwise(starts)]
    alike: dict[int, Lane] = {}
    for part in cut:
        if part is not None and len(part) == 1:
            channels.pin(part, call.reason("cuts off a single channel"))
        elif part is not None:
            channels.couple(alike.setdefault(len(part), part), part)
    return [
        Traveller(shape, [part if k == axis else other for k, other in enumerate(source.lanes)])
        for shape, part in zip(call.result_shape, cut, strict=True)
    ]


def unbind(channels: Channels, call: Call) -> Result:
    """One tensor per position of an axis."""
    source = call.args[0]
    axis = call.arg(1, 0) % len(source.shape)
    channels.pin(source.lanes[axis], call.reason("takes single channels"))
    rest = [lane for k, lane in enumerate(source.lanes) if k != axis]
    return [Traveller(shape, list(rest)) for shape in call.result_shape]


def slice_(channels: Channels, call: Call) -> Traveller:
    """A range of positions; where it cuts channels, their count stands in code and they stay."""
    source = call.args[0]
    axis = call.arg(1, 0) % len(source.shape)
    lanes = list(source.lanes)
    lane = lanes[axis]
    if lane is not None and call.shape[axis] != source.shape[axis]:
        channels.pin(lane, call.reason("cuts a range of the channels"))
        index: Ints = np.arange(len(lane))[slice(call.arg(2), call.arg(3), call.arg(4, 1))]
        lanes[axis] = lane.take(index)
    return Traveller(call.shape, lanes)


def select(channels: Channels, call: Call) -> Traveller:
    """One position of an axis."""
    source = call.args[0]
    axis = call.arg(1, 0) % len(source.shape)
    channels.pin(source.lanes[axis], call.reason("takes a single channel"))
    return Traveller(call.shape, [lane for k, lane in enumerate(source.lanes) if k != axis])
