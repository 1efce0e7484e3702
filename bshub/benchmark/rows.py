"""Rows of a benchmark as JSON lines: written one by one, safe to kill, found again by what they measured."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bshub.errors import UsageError


@dataclass(frozen=True)
class Cell:
    """One place of the grid.

    Attributes:
        model: Name of the model's folder.
        weights: Start of the sha256 of its weights: a model trained anew is another model.
        method: As asked for, ``NAME`` or ``NAME:key=value,…``.
        per_class: Clean images per class; 0: none were given.
        seed: Of the draw of clean images and of the method.
        effort: Share of the published iterations of a baseline.
        test_images: Number of test images.
    """

    model: str
    weights: str
    method: str
    per_class: int
    seed: int
    effort: float
    test_images: int

    def key(self) -> str:
        """The same for the same measurement."""
        return json.dumps(asdict(self), sort_keys=True)


def on_weights(method: str) -> bool:
    """Whether a method, as asked for, looks at no image: one row stands for all sample counts."""
    return method.partition(":")[0] == "clp"


class Rows:
    """The rows of one file.

    Args:
        path: JSON lines; made with the first row.

    Raises:
        UsageError: A line that is not the last cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text.split("\n")
        for number, line in enumerate(lines):
            if not line:
                continue
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                if number < len(lines) - 1:
                    raise UsageError(
                        f"line {number + 1} of {path} is not JSON", hint="remove the line, or name another folder"
                    ) from None
                # the process was killed while it wrote: what is left of its last row goes
                path.write_text("".join(f"{line}\n" for line in lines[:number]), encoding="utf-8")
        self._done = {self._cell_of(row).key() for row in self.rows}

    @staticmethod
    def _cell_of(row: dict[str, Any]) -> Cell:
        return Cell(**row["cell"])

    def __contains__(self, cell: Cell) -> bool:
        return cell.key() in self._done

    def add(self, cell: Cell, measured: dict[str, Any]) -> dict[str, Any]:
        """Write one row through to the disk."""
        row = {"cell": asdict(cell), **measured}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.rows.append(row)
        self._done.add(cell.key())
        return row
