"""Statistics → coupling groups in the order in which the network can do without them, the most useless first.

``t[o] = mean over images of (Σ BN(z)[o] · ∂L/∂BN(z)[o])²`` is what a filter means to the loss, to first order
(``taylor`` in ``statistics.py``; Molchanov et al. 2019, arXiv 1906.10771, equation 8, with the batch norm as the gate).
Layers differ in scale, so that of a layer is divided by its norm (ibid., section 4: as in Molchanov et al. 2017):

    u[o] = t[o] / ‖t‖₂        U(group) = Σ over its filters u[o]

A group leaves as a whole, with every filter that writes into it, or not at all. Nothing here looks at a trigger.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bshub.errors import UsageError
from bshub.graph.channels import Ints
from bshub.graph.coupling import ChannelFlow
from bshub.graph.pairs import Pairing
from bshub.scoring.plan import leaving_groups
from bshub.scoring.statistics import PairStatistics

MOST_OF_A_LAYER = 0.8  # of its filters, suspicious and spare together
TINY, MOST = 1e-30, float(np.finfo(np.float32).max)  # what overflows is not called useless

Filter = tuple[str, int]  # convolution, index


def usefulness(statistics: PairStatistics) -> NDArray[np.float64]:
    """``t / ‖t‖₂`` of one layer.

    Args:
        statistics: Of the layer, with ``taylor``, ``[out_channels]``.

    Returns:
        ``[out_channels]``, 0 and above; a layer that means nothing to the loss gets zeros.

    Raises:
        UsageError: The statistics were made without ``taylor``.
    """
    if statistics.taylor is None:
        raise UsageError("usefulness needs clean images", hint="give --clean-dir, or leave --shrink away")
    values = np.nan_to_num(statistics.taylor.double().numpy(), nan=MOST, posinf=MOST)
    return values / max(float(np.linalg.norm(values)), TINY)


def spare_order(
    flow: ChannelFlow,
    pairing: Pairing,
    statistics: Mapping[str, PairStatistics],
    flagged: Mapping[str, Sequence[int]],
) -> list[list[Filter]]:
    """Groups that could leave beside the flagged filters, the most useless first.

    Those come into question that nothing pins, that no convolution without a batch norm keeps alive, and that do not
    leave already. A group is passed over once it would take more than 80 % of a layer, so that no layer collapses
    however many groups are taken from the front.

    Args:
        flow: The model's channels.
        pairing: Its conv-BN pairs.
        statistics: Convolution → statistics with ``taylor``.
        flagged: Convolution → suspicious filters; they leave anyway and are in no group.

    Returns:
        For each group its filters with a batch norm that are not flagged.

    Raises:
        UsageError: The statistics were made without ``taylor``.
    """
    suspicious = {name: np.asarray(index, np.int64) for name, index in flagged.items()}
    free = leaving_groups(flow, pairing, {pair.name: np.flatnonzero(pair.paired) for pair in pairing.pairs})
    free &= ~leaving_groups(flow, pairing, suspicious)
    groups: dict[int, list[Filter]] = {}
    useful: dict[int, float] = {}
    room: Counter[str] = Counter()
    for pair in pairing.pairs:
        known = usefulness(statistics[pair.name])
        marked = np.zeros(pair.out_channels, bool)
        marked[suspicious.get(pair.name, [])] = True
        room[pair.name] = math.floor(MOST_OF_A_LAYER * pair.out_channels) - int(marked.sum())
        ids: Ints = flow.groups[pair.slots]
        for index in np.flatnonzero(free[ids] & pair.paired & ~marked).tolist():
            group = int(ids[index])
            groups.setdefault(group, []).append((pair.name, index))
            useful[group] = useful.get(group, 0.0) + float(known[index])
    order = []
    for group in sorted(groups, key=lambda group: (useful[group], group)):
        taken = Counter(name for name, _ in groups[group])
        if all(room[name] >= count for name, count in taken.items()):
            room.subtract(taken)
            order.append(groups[group])
    return order


def taken(order: Sequence[Sequence[Filter]], most: float) -> dict[str, Ints]:
    """The first groups of an order, as many as have at most ``most`` filters together.

    Args:
        order: Groups of filters.
        most: Number of filters.

    Returns:
        Convolution → filter indices.
    """
    found: dict[str, list[int]] = {}
    count = 0
    for group in order:
        count += len(group)
        if count > most:
            break
        for name, index in group:
            found.setdefault(name, []).append(index)
    return {name: np.array(sorted(index), np.int64) for name, index in found.items()}
