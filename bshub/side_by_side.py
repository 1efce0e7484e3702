"""Small independent pieces of work on one network, each on a core of its own instead of all cores on each.

A step on eight images keeps two cores three quarters busy and sixteen hardly at all, while ten of them, one core each,
scale with the cores. Every thread gets a twin of the network, which shares the weights: a module may keep something
of one run in itself, and then another run must not find it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol, TypeVar

import torch
from torch import nn

from bshub.copying import copy_sharing

MOST = 8  # threads: each holds the maps of its own images, and eight of the search hold what a step of the repair does
Item = TypeVar("Item")


class Each(Protocol):
    """Does one work on every item; comes back when all are done, with the error of the first that failed."""

    def __call__(self, work: Callable[[nn.Module, Item], None], items: Iterable[Item], /) -> None:
        """``work(twin, item)`` for every item."""


def twin(model: nn.Module) -> nn.Module:
    """The same network as other modules, in evaluation mode: parameters and buffers are shared, all else is copied."""
    return copy_sharing(model, lambda name: True)


@contextmanager
def side_by_side(model: nn.Module, pieces: int) -> Iterator[Each]:
    """Spread pieces of work over the cores that torch may use; on a GPU they run one after the other.

    What is computed does not depend on the number of threads. Work that changes weights or draws random numbers does
    not belong here.

    Args:
        model: The network; nobody may change its weights meanwhile.
        pieces: How many there will be at a time.

    Returns:
        A context with ``each(work, items)``.
    """
    cores = torch.get_num_threads()
    threads = min(cores, pieces, MOST)
    first = next(model.parameters(), None)
    if threads < 2 or (first is not None and first.device.type != "cpu"):

        def in_turn(work: Callable[[nn.Module, Item], None], items: Iterable[Item], /) -> None:
            for item in items:
                work(model, item)

        yield in_turn
        return
    free: SimpleQueue[nn.Module] = SimpleQueue()
    for _ in range(threads):
        free.put(twin(model))
    # a new thread begins with the number that was set last
    torch.set_num_threads(cores // threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="bshub")

    def at_once(work: Callable[[nn.Module, Item], None], items: Iterable[Item], /) -> None:
        def run(item: Item) -> None:
            mine = free.get()
            try:
                work(mine, item)
            finally:
                free.put(mine)

        list(pool.map(run, items))

    try:
        yield at_once
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)
