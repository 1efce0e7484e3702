"""Bookkeeping for channels on their way through a graph.

Every index of every parameter axis is a *variable*. A tensor in flight carries, per axis, the variables
its positions belong to, or nothing where the axis has no channels (batch, height, width). Rules *couple*
variables that must leave together, *pin* variables that must stay, and *read* them where a conv or linear
mixes them into new ones. The coupling groups are the connected components.

Beside its variable every position carries a *value*: the id of the number stream computed there. Values
tell when a slot is dead, that is, when every reader of it sees only zeros (or a constant, after a depthwise
conv or a gate), so that it can leave the network physically. ``levels`` answers that for a set of silenced
filters: ``ALIVE`` < ``CONSTANT`` < ``ZERO``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ALIVE, CONSTANT, ZERO = 0, 1, 2
NO_VALUE = 0  # value id of parameters and unknowns: always alive


@dataclass
class Lane:
    """The channels along one axis of one tensor.

    Attributes:
        slots: Variable of each position, ``[n]``.
        values: Value id of each position, ``[n]``.
    """

    slots: Ints
    values: Ints

    def __len__(self) -> int:
        return len(self.slots)

    def take(self, index: Ints | slice) -> Lane:
        """The positions at ``index``, in its order."""
        return Lane(self.slots[index], self.values[index])


@dataclass
class Traveller:
    """A tensor in flight: its shape and the lane (or None) of each axis."""

    shape: tuple[int, ...]
    lanes: list[Lane | None]

    @classmethod
    def plain(cls, shape: Sequence[int]) -> Traveller:
        """A tensor without channels."""
        return cls(tuple(shape), [None] * len(shape))


@dataclass
class Channels:
    """Everything the rules wrote down about one model (over one or more recordings)."""

    axes: dict[str, list[Ints]] = field(default_factory=dict)  # parameter → variables per axis
    reads: list[tuple[Ints, Ints]] = field(default_factory=list)  # (slots, values) seen by a conv or linear
    zero_reads: list[tuple[Ints, Ints]] = field(default_factory=list)  # readers to which a constant is not a zero
    contracted: list[Ints] = field(default_factory=list)  # weight variables summed over by a reader
    refills: dict[str, tuple[int, Lane]] = field(default_factory=dict)  # module → axis and lane it slides along
    pins: list[tuple[Ints, str]] = field(default_factory=list)
    variables: int = 0
    values: int = NO_VALUE + 1
    _edges: list[tuple[Ints, Ints]] = field(default_factory=list)
    _program: list[tuple[str, Ints, Sequence[Ints]]] = field(default_factory=list)
    _gates: list[tuple[int, int]] = field(default_factory=list)  # value id ranges, ascending

    def parameter(self, name: str, shape: tuple[int, ...]) -> Traveller:
        """The traveller of a parameter; its variables are made at first sight."""
        if name not in self.axes:
            self.axes[name] = [self.new_variables(size) for size in shape]
        lanes: list[Lane | None] = [
            Lane(slots, np.full(size, NO_VALUE)) if size > 1 else None
            for size, slots in zip(shape, self.axes[name], strict=True)
        ]
        return Traveller(shape, lanes)

    def new_variables(self, count: int) -> Ints:
        """``count`` variables of their own."""
        start, self.variables = self.variables, self.variables + count
        return np.arange(start, self.variables)

    def new_values(self, count: int) -> Ints:
        """Ids of ``count`` number streams that nothing is known about."""
        start, self.values = self.values, self.values + count
        return np.arange(start, self.values)

    def derive(self, rule: str, *sources: Ints) -> Ints:
        """Value ids computed from others: ``rule`` is ``add``, ``multiply`` or ``offset``."""
        result = self.new_values(len(sources[0]))
        self._program.append((rule, result, sources))
        return result

    def gate(self, values: Ints) -> Ints:
        """Value ids of a gate computed from ``values``: a factor that only scales another stream."""
        result = self.derive("offset", values)
        self._gates.append((int(result[0]), int(result[-1]) + 1))
        return result

    def is_gate(self, values: Ints) -> bool:
        """Whether all of ``values`` are gates."""
        if not self._gates:
            return False
        starts, stops = np.array(self._gates).T
        place = np.searchsorted(starts, values, side="right") - 1
        return bool(((place >= 0) & (values < stops[place])).all())

    def couple(self, a: Lane, b: Lane) -> None:
        """Position ``i`` of both lanes leaves the network together."""
        self._edges.append((a.slots, b.slots))

    def pin(self, lane: Lane | None, reason: str) -> None:
        """The lane's slots can never leave."""
        if lane is not None:
            self.pins.append((lane.slots, reason))

    def read(self, data: Lane, weight: Lane) -> None:
        """A conv or linear sums over ``data`` with the coefficients ``weight``."""
        self.couple(data, weight)
        self.reads.append((data.slots, data.values))
        self.contracted.append(weight.slots)

    def groups(self) -> Ints:
        """Coupling group of every variable: ``[variables]``, named by its smallest member."""
        a = np.concatenate([edge[0] for edge in self._edges] or [np.empty(0, np.int64)])
        b = np.concatenate([edge[1] for edge in self._edges] or [np.empty(0, np.int64)])
        return connected_components(self.variables, a, b)

    def pinned(self, groups: Ints) -> dict[int, str]:
        """Group → reason, for each group that must stay."""
        reasons: dict[int, str] = {}
        for slots, reason in self.pins:
            for group in np.unique(groups[slots]).tolist():
                reasons.setdefault(group, reason)
        return reasons

    def levels(self, silenced: Ints) -> NDArray[np.int8]:
        """What is left of each value when the values ``silenced`` are zero: ``[values]``."""
        level = np.zeros(self.values, np.int8)
        level[silenced] = ZERO
        for rule, result, sources in self._program:
            stack = np.stack([level[source] for source in sources])  # (sources, n)
            low = stack.min(0)
            if rule == "multiply":
                low = np.where(stack.max(0) == ZERO, ZERO, low)
            elif rule == "offset":
                low = np.minimum(low, CONSTANT)
            level[result] = np.maximum(level[result], low)
        return level


def connected_components(count: int, a: Ints, b: Ints) -> Ints:
    """Smallest member of each node's component, by hooking and pointer jumping.

    Args:
        count: Number of nodes.
        a: One end of every edge, ``[edges]``.
        b: The other end, ``[edges]``.

    Returns:
        ``[count]``.
    """
    parent = np.arange(count)
    while len(a):
        pa, pb = parent[a], parent[b]
        open_ = pa != pb
        a, b, pa, pb = a[open_], b[open_], pa[open_], pb[open_]
        np.minimum.at(parent, np.maximum(pa, pb), np.minimum(pa, pb))
        while True:
            jumped = parent[parent]
            if np.array_equal(jumped, parent):
                break
            parent = jumped
    return parent
