"""Statistics → coupling groups in the order in which the network can do without them, the most useless first.

``t[o] = mean over images of (Σ BN(z)[o] · ∂L/∂BN(z)[o])²`` is what a filter means to the loss, to first order
(``taylor`` in ``statistics.py``; Molchanov et al. 2019, arXiv 1906.10771, equation 8, with the batch norm as the gate).
Layers differ in scale, so that of a layer is divided by its norm (ibid., section 4: as in Molchanov et al. 2017):

    u[o] = t[o] / ‖t‖₂        U(group) = Σ over its filters u[o]

A group leaves as a whole, with every filter that writes into it, or not at all. Groups of the same convolutions leave
in portions that bring a wide layer to a multiple of 8 filters: runtimes compute odd widths slower than the full ones.
Nothing here looks at a trigger.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bshub.errors import UsageError
from bshub.graph.channels import Ints
from bshub.graph.coupling import ChannelFlow
from bshub.graph.pairs import Pairing
from bshub.scoring.plan import as_arrays, leaving_groups
from bshub.scoring.statistics import PairStatistics

MOST_OF_A_LAYER = 0.8  # of its filters, suspicious and spare together
WIDE, STEP = 24, 8  # a layer that was this wide keeps a multiple of 8 filters
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
    """Portions of groups that could leave beside the flagged filters, the most useless first.

    Groups come into question that nothing pins, that no convolution without a batch norm keeps alive, and that do not
    leave already. Layers whose width the flagged filters made odd are evened first. A portion is left out that would
    take more than 80 % of a layer, so that no layer collapses however many portions are taken from the front.

    Args:
        flow: The model's channels.
        pairing: Its conv-BN pairs.
        statistics: Convolution → statistics with ``taylor``.
        flagged: Convolution → suspicious filters; they leave anyway and are in no portion.

    Returns:
        For each portion its filters with a batch norm that are not flagged.

    Raises:
        UsageError: The statistics were made without ``taylor``.
    """
    suspicious = as_arrays(flagged)
    gone = leaving_groups(flow, pairing, suspicious)
    free = ~gone & leaving_groups(flow, pairing, {pair.name: np.flatnonzero(pair.paired) for pair in pairing.pairs})
    groups: dict[int, list[Filter]] = {}
    writers: dict[int, list[str]] = {}
    useful: Counter[int] = Counter()
    room: Counter[str] = Counter()
    width: dict[str, tuple[int, int]] = {}  # before and after the flagged filters have left
    for pair in pairing.pairs:
        known = usefulness(statistics[pair.name])
        marked = np.zeros(pair.out_channels, bool)
        marked[suspicious.get(pair.name, [])] = True
        room[pair.name] = math.floor(MOST_OF_A_LAYER * pair.out_channels) - int(marked.sum())
        ids: Ints = flow.groups[pair.slots]
        width[pair.name] = pair.out_channels, int((~gone[ids]).sum())
        for index in np.flatnonzero(free[ids] & pair.paired).tolist():
            group = int(ids[index])
            writers.setdefault(group, []).append(pair.name)
            if not marked[index]:
                groups.setdefault(group, []).append((pair.name, index))
                useful[group] += known[index]  # type: ignore[assignment]
    alike: dict[tuple[str, ...], list[int]] = {}
    for group in sorted(groups, key=lambda group: (useful[group], group)):
        alike.setdefault(tuple(sorted(set(writers[group]))), []).append(group)
    ranked: list[tuple[bool, float, int, list[Filter]]] = []
    for names, members in alike.items():
        whole, now = width[names[0]]
        for portion in _portions(members, [writers[group].count(names[0]) for group in members], whole, now):
            mends = whole >= WIDE and whole % STEP == 0 and now % STEP != 0 and portion[0] == members[0]
            mean = sum(useful[group] for group in portion) / len(portion)
            ranked.append((not mends, mean, portion[0], [item for group in portion for item in groups[group]]))
    order = []
    for *_, filters in sorted(ranked):
        takes = Counter(name for name, _ in filters)
        if all(room[name] >= count for name, count in takes.items()):
            room.subtract(takes)
            order.append(filters)
    return order


def _portions(groups: list[int], filters: list[int], whole: int, now: int) -> Iterator[list[int]]:
    """Runs of groups after which a layer's width is a multiple of 8; one by one where it was never wide."""
    portion: list[int] = []
    for group, count in zip(groups, filters, strict=True):
        portion.append(group)
        now -= count
        if whole < WIDE or now % STEP == 0:
            yield portion
            portion = []


def taken(order: Sequence[Sequence[Filter]], most: float) -> dict[str, Ints]:
    """The first portions of an order, as many as have at most ``most`` filters together.

    Args:
        order: Portions of filters.
        most: Number of filters.

    Returns:
        Convolution → filter indices.
    """
    found: dict[str, list[int]] = {}
    count = 0
    for portion in order:
        count += len(portion)
        if count > most:
            break
        for name, index in portion:
            found.setdefault(name, []).append(index)
    return {name: np.array(sorted(index), np.int64) for name, index in found.items()}
