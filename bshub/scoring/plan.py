"""Flagged filters → :class:`RemovalPlan`: which slots leave the network, which filters fall silent in place.

A slot leaves when nothing pins its coupling group and every convolution or linear that reads it would see
only zeros (or a constant) once the flagged filters are silent. A flagged filter whose slot still carries
something (the other branch of a residual sum) is silenced: its weights, bias, batch-norm scale and shift
become zero, which is the paper's pruning. A *spare* filter is not suspicious, merely of little use: it leaves with
its whole group or not at all, and is never silenced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bshub.graph.channels import ALIVE, ZERO, Ints
from bshub.graph.coupling import ChannelFlow
from bshub.graph.pairs import ConvBN, Pairing


@dataclass(frozen=True)
class RemovalPlan:
    """What will happen to which filter.

    Attributes:
        flagged: Convolution → filters judged suspicious.
        removed: Those of them that leave physically.
        silenced: Those of them that stay as zeros.
        followers: Convolution → filters that were neither and leave with one of them (depthwise chains).
        kept: Parameter → axis → indices that stay, for each axis that loses some.
        columns: Parameter → axis → indices read from leaving slots, for the proof.
        zeroed: Parameter or buffer → indices of axis 0 that become zero (silenced filters and their batch norm).
        stays: Convolution → why its flagged filters could not leave.
        refilled: Module that slides along its channels → (axis, width before, indices that stay).
        spare: Convolution → filters that leave because they are of little use, not because they are suspicious.
    """

    flagged: dict[str, list[int]]
    removed: dict[str, list[int]]
    silenced: dict[str, list[int]]
    followers: dict[str, list[int]]
    kept: dict[str, dict[int, list[int]]]
    columns: dict[str, dict[int, list[int]]]
    zeroed: dict[str, list[int]]
    stays: dict[str, str]
    refilled: dict[str, tuple[int, int, list[int]]] = field(default_factory=dict)
    spare: dict[str, list[int]] = field(default_factory=dict)

    def zeroed_after(self) -> dict[str, list[int]]:
        """``zeroed`` with the indices that the tensors have once the leaving ones are cut out."""
        result = {}
        for name, index in self.zeroed.items():
            kept = self.kept.get(name, {}).get(0)
            place = {old: new for new, old in enumerate(kept)} if kept is not None else None
            result[name] = index if place is None else [place[i] for i in index if i in place]
        return result

    def counts(self) -> dict[str, int]:
        """Numbers of flagged, removed, silenced and following filters, and of spare ones where there are any."""
        parts = {
            "flagged": self.flagged,
            "removed": self.removed,
            "silenced": self.silenced,
            "followers": self.followers,
            **({"spare": self.spare} if self.spare else {}),
        }
        return {name: sum(map(len, part.values())) for name, part in parts.items()}


def make_plan(
    flow: ChannelFlow,
    pairing: Pairing,
    flagged: Mapping[str, Ints],
    forbidden: frozenset[int] = frozenset(),
    spare: Mapping[str, Ints] | None = None,
) -> RemovalPlan:
    """Work out what leaves.

    Args:
        flow: The model's channels.
        pairing: Its conv-BN pairs.
        flagged: Convolution → indices of suspicious filters.
        forbidden: Groups that must stay although nothing pins them (found by the proof).
        spare: Convolution → indices of useless filters; those whose group cannot leave are left out of the plan.

    Returns:
        The plan.
    """
    groups = flow.groups
    pairs = {pair.name: pair for pair in (*pairing.pairs, *pairing.bare)}
    marked = {name: np.unique(np.asarray(index, np.int64)) for name, index in flagged.items() if len(index)}
    useless = {
        name: np.setdiff1d(np.asarray(index, np.int64), marked.get(name, [])) for name, index in (spare or {}).items()
    }
    while True:
        leaving = leaving_groups(flow, pairing, _union(marked, useless), forbidden)
        _keep_last(flow, leaving)
        staying = {name: ~leaving[groups[pairs[name].slots[index]]] for name, index in useless.items()}
        if not any(stays.any() for stays in staying.values()):
            break
        useless = {name: index[~staying[name]] for name, index in useless.items()}  # none of them is silenced

    gone = leaving[groups]  # by variable
    kept, columns = _cuts(flow, gone)
    removed: dict[str, list[int]] = {}
    silenced: dict[str, list[int]] = {}
    followers: dict[str, list[int]] = {}
    zeroed: dict[str, set[int]] = {}
    stays: dict[str, str] = {}
    for pair in pairs.values():
        chosen = np.zeros(pair.out_channels, bool)
        chosen[marked.get(pair.name, [])] = True
        extra = np.zeros(pair.out_channels, bool)
        extra[useless.get(pair.name, [])] = True
        out = gone[pair.slots]
        _store(removed, pair.name, chosen & out)
        _store(silenced, pair.name, chosen & ~out)
        _store(followers, pair.name, out & ~chosen & ~extra)
        if (chosen & ~out).any():
            _silence(pair, np.flatnonzero(chosen & ~out), zeroed)
            pins = {flow.pinned[g] for g in groups[pair.slots[chosen & ~out]].tolist() if g in flow.pinned}
            kept_back = any(int(group) in forbidden for group in groups[pair.slots[chosen & ~out]])
            default = "removing it is not exact" if kept_back else "another branch writes or reads the same channel"
            stays[pair.name] = "; ".join(sorted(pins)) or default
    return RemovalPlan(
        flagged={name: index.tolist() for name, index in marked.items()},
        removed=removed,
        silenced=silenced,
        followers=followers,
        kept=kept,
        columns=columns,
        zeroed={name: sorted(index) for name, index in zeroed.items()},
        stays=stays,
        refilled=_refilled(flow, gone),
        spare={name: index.tolist() for name, index in useless.items() if len(index)},
    )


def cuts_alone(flow: ChannelFlow, gone: np.ndarray) -> RemovalPlan:
    """A plan that says what leaves the tensors, and nothing of why.

    Args:
        flow: The model's channels.
        gone: Whether each variable leaves, ``[variables]``; whole groups.

    Returns:
        The plan, with ``kept``, ``columns`` and ``refilled``.
    """
    kept, columns = _cuts(flow, gone)
    return RemovalPlan({}, {}, {}, {}, kept, columns, {}, {}, _refilled(flow, gone))


def variables_gone(flow: ChannelFlow, kept: Mapping[str, Mapping[int, Sequence[int]]]) -> np.ndarray:
    """The inverse: which variables leave, told from the axes that lose indices.

    Args:
        flow: The model's channels.
        kept: Parameter → axis → indices that stay.

    Returns:
        ``[variables]``.
    """
    leaving = np.zeros(flow.channels.variables, bool)
    for name, axes in kept.items():
        for axis, stays in axes.items():
            slots = flow.channels.axes[name][axis]
            lost = np.ones(len(slots), bool)
            lost[list(stays)] = False
            leaving[flow.groups[slots[lost]]] = True
    return leaving[flow.groups]


def as_arrays(filters: Mapping[str, Sequence[int]]) -> dict[str, Ints]:
    """Filters of a plan in the form that :func:`make_plan` takes.

    Args:
        filters: Convolution → filter indices.

    Returns:
        The same as int64 arrays.
    """
    return {name: np.asarray(index, np.int64) for name, index in filters.items()}


def leaving_groups(
    flow: ChannelFlow, pairing: Pairing, marked: Mapping[str, Ints], forbidden: frozenset[int] = frozenset()
) -> np.ndarray:
    """Groups that nothing would read any more if the marked filters were silent, and that nothing pins.

    Args:
        flow: The model's channels.
        pairing: Its conv-BN pairs.
        marked: Convolution → filter indices.
        forbidden: Groups that must stay.

    Returns:
        Whether each group leaves, by group id, ``[variables]``.
    """
    channels, groups = flow.channels, flow.groups
    pairs = {pair.name: pair for pair in (*pairing.pairs, *pairing.bare)}
    silent = [values for name, index in marked.items() for values in _silent_values(pairs[name], index)]
    levels = channels.levels(np.concatenate(silent) if silent else np.empty(0, np.int64))
    leaving = np.zeros(channels.variables, bool)
    for name, index in marked.items():
        leaving[groups[pairs[name].slots[index]]] = True
    for slots, values in channels.reads:
        leaving[groups[slots[levels[values] == ALIVE]]] = False
    for slots, values in channels.zero_reads:
        leaving[groups[slots[levels[values] != ZERO]]] = False
    blocked = [group for group in (*flow.pinned, *forbidden) if leaving[group]]
    leaving[blocked] = False
    return leaving


def _union(one: Mapping[str, Ints], other: Mapping[str, Ints]) -> dict[str, Ints]:
    nothing = np.empty(0, np.int64)
    return {name: np.union1d(one.get(name, nothing), other.get(name, nothing)) for name in {**one, **other}}


def _silent_values(pair: ConvBN, filters: Ints) -> list[Ints]:
    """Value ids that are zero once the filters and their batch norm are: conv outputs and norm outputs."""
    after = [reader.norm.outputs[reader.channels[np.isin(reader.filters, filters)]] for reader in pair.readers]
    return [pair.values[:, filters].ravel(), *after] if pair.rows else after


def _keep_last(flow: ChannelFlow, leaving: np.ndarray) -> None:
    """No axis loses its last index: its first leaving group stays."""
    changed = True
    while changed:
        changed = False
        for axes in flow.channels.axes.values():
            for slots in axes:
                if len(slots) and leaving[flow.groups[slots]].all():
                    leaving[flow.groups[slots[0]]] = False
                    changed = True


def _cuts(
    flow: ChannelFlow, gone: np.ndarray
) -> tuple[dict[str, dict[int, list[int]]], dict[str, dict[int, list[int]]]]:
    contracted = np.zeros(flow.channels.variables, bool)
    for slots in flow.channels.contracted:
        contracted[slots] = True
    kept: dict[str, dict[int, list[int]]] = {}
    columns: dict[str, dict[int, list[int]]] = {}
    stays: dict[bytes, list[int]] = {}  # a filter, its bias and its batch norm keep the same indices: one list for all
    for name, axes in flow.channels.axes.items():
        for axis, slots in enumerate(axes):
            lost = gone[slots]
            if lost.any():
                same = lost.tobytes()
                if same not in stays:
                    stays[same] = np.flatnonzero(~lost).tolist()
                kept.setdefault(name, {})[axis] = stays[same]
                read = np.flatnonzero(lost & contracted[slots])
                if len(read):
                    columns.setdefault(name, {})[axis] = read.tolist()
    return kept, columns


def _refilled(flow: ChannelFlow, gone: np.ndarray) -> dict[str, tuple[int, int, list[int]]]:
    return {
        module: (axis, len(lane), np.flatnonzero(~gone[lane.slots]).tolist())
        for module, (axis, lane) in flow.channels.refills.items()
        if gone[lane.slots].any()
    }


def _silence(pair: ConvBN, filters: Ints, zeroed: dict[str, set[int]]) -> None:
    if pair.rows:
        zeroed.setdefault(f"{pair.name}.weight", set()).update(filters.tolist())
    zeroed.setdefault(f"{pair.name}.bias", set()).update(filters.tolist())
    for reader in pair.readers:
        hit = reader.channels[np.isin(reader.filters, filters)].tolist()
        for parameter in (reader.norm.weight, reader.norm.bias):
            if parameter:
                zeroed.setdefault(parameter, set()).update(hit)


def _store(where: dict[str, list[int]], name: str, mask: np.ndarray) -> None:
    if mask.any():
        where[name] = np.flatnonzero(mask).tolist()
