"""The rows of a fleet → ``fleet.parquet`` for programs and ``fleet.html`` for people."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from bshub.fleet.store import Store

HERE = Path(__file__).parent
WORST_FIRST = ("failed", "refused", "cleaned", "hardened", "unchanged")
# Every column, so that a fleet in which all models fail has the same table as any other.
COLUMNS = {
    "reference": "string", "key": "string", "state": "string", "reason": "string", "folder": "string",
    "architecture": "string", "classes": "int64", "filters": "int64", "mu": "float64", "flagged": "int64",
    "removed": "int64", "silenced": "int64", "clean_images": "int64", "accuracy_before": "float64",
    "accuracy_after": "float64", "test_accuracy_before": "float64", "test_accuracy_after": "float64",
    "parameters_before": "int64", "parameters_after": "int64", "warnings": "int64", "seconds": "float64",
    "attempts": "int64", "host": "string", "process": "int64", "finished": "float64",
}  # fmt: skip


def write_summary(rows: Sequence[dict[str, Any]], store: Store) -> None:
    """Write both beside the records.

    Args:
        rows: One a model.
        store: Of the fleet.

    Raises:
        OutputError: They cannot be written.
    """
    store.write(parquet(rows), "fleet.parquet")
    store.write(page(rows).encode(), "fleet.html")


def parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    """The rows as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet

    schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in COLUMNS.items()])
    table = pa.Table.from_pylist([{name: row.get(name) for name in COLUMNS} for row in rows], schema=schema)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a page that needs nothing but a browser: what needs a look comes first."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    ordered = sorted(rows, key=lambda row: (WORST_FIRST.index(row["state"]), row["reference"]))
    counts = {state: sum(row["state"] == state for row in rows) for state in WORST_FIRST}
    return environment.get_template("fleet.html.jinja").render(rows=ordered, counts=counts)
