"""The default with one of its parts left out, of those that no setting turns off: ``bshub-recall`` and so on.

``experiments.py`` measures them; a part is a line in ``PARTS``: what it is in words, and how it is taken out for as
long as a ``with`` lasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from bshub import diagnosis
from bshub.benchmark.grid import Grid, run_grid
from bshub.benchmark.rows import Cell, Rows
from bshub.progress import Steps
from bshub.repair import lesson
from bshub.repair.finetune import REPAIRS, Repair, distil
from bshub.scoring import confirmation
from bshub.scoring.families import FAMILIES

PREFIX = "bshub-"


@dataclass(frozen=True)
class Part:
    """Something that the default does.

    Attributes:
        words: What is missing without it.
        taken_out: How.
        unaided: Whether it is left out where there is no image as well: batch norm is not asked then, and made-up
            images show no class.
    """

    words: str
    taken_out: Callable[[], AbstractContextManager[Any]]
    unaided: bool = False


def _without_memory() -> AbstractContextManager[Any]:
    found = diagnosis._shifted
    return patch.object(diagnosis, "_shifted", lambda *asked: replace(found(*asked), bound=math.inf))


def _without_family(name: str) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def taken_out() -> Iterator[None]:
        with patch.dict(FAMILIES):
            del FAMILIES[name]
            yield

    return taken_out


PARTS = {
    "memory": Part("filters whose batch norm remembers other images count for nothing", _without_memory),
    "recall": Part("batch norm is not asked for waves", _without_family("waves")),
    "patch": Part("no search for a patch", _without_family("patch"), unaided=True),
    "additive": Part("no search for a faint change of the whole image", _without_family("additive"), unaided=True),
    "warp": Part("no search for a warp", _without_family("warp"), unaided=True),
    "likeness": Part(
        "a trigger that is like its class is believed all the same", lambda: patch.object(confirmation, "LIKE", 2.0)
    ),
    "mixtures": Part(
        "no mixtures of the clean images in the repair",
        lambda: patch.dict(REPAIRS, {"distil": Repair(distil, mixes=False)}),
    ),
    "strengths": Part(
        "the repair shows a trigger only as strong as the weakest that works",
        lambda: patch.object(lesson, "STRONGEST", 1.0),
    ),
}


class Renamed(Rows):
    """Rows of the default, kept under the name of what was left out.

    Args:
        rows: Where they really go.
        name: Of the method.
    """

    def __init__(self, rows: Rows, name: str) -> None:
        self._rows, self._name = rows, name

    def __contains__(self, cell: Cell) -> bool:
        return self._renamed(cell) in self._rows

    def add(self, cell: Cell, measured: dict[str, Any]) -> dict[str, Any]:
        """Write one row."""
        return self._rows.add(self._renamed(cell), measured)

    def _renamed(self, cell: Cell) -> Cell:
        return replace(cell, method=self._name)


def left_out_methods() -> list[str]:
    """Names as they stand in the rows."""
    return [PREFIX + part for part in PARTS]


def run_left_out(method: str, grid: Grid, rows: Rows, steps: Steps) -> None:
    """Measure the default without one part.

    Args:
        method: ``bshub-PART``.
        grid: Its methods are not used, and of its numbers of images only the first, and none where that makes sense.
        rows: Where the rows go.
        steps: Where the work is shown.
    """
    part = PARTS[method.removeprefix(PREFIX)]
    counts = (*grid.per_class[:1], *(0 for count in grid.per_class[1:] if not count and part.unaided))
    with part.taken_out():
        run_grid(replace(grid, methods=("bshub",), per_class=counts), Renamed(rows, method), steps)
