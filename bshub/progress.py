"""How long work says where it stands. The library only knows this protocol; the command line draws the bars."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Something that can show a step being worked on."""

    @contextmanager
    def step(self, name: str, total: int | None) -> Iterator[Advance]:
        """Show ``name`` while the block runs; call what is yielded with each amount done, out of ``total``."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def step(self, name: str, total: int | None) -> Iterator[Advance]:
        """Run the block."""
        yield lambda amount: None


class Steps:
    """Runs steps under a :class:`Progress` and keeps the seconds of each.

    Attributes:
        seconds: Step → wall-clock seconds, in order.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress or Silent()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Show and time one step."""
        start = time.perf_counter()
        with self._progress.step(name, total) as advance:
            yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
