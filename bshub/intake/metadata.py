"""The table beside a folder of images: ``metadata.csv`` or ``metadata.jsonl``, as Hugging Face's imagefolder has it.

Each row names an image by ``file_name``, relative to the table, and its class by ``label``: a number is an index, a
text a name. A table without such a column says nothing about classes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from bshub.errors import ImageDataError, printable

TABLES = ("metadata.csv", "metadata.jsonl")
ANNOTATIONS = "val_annotations.txt"  # beside Tiny ImageNet's validation images
_MAX_BYTES = 256 << 20
_COLUMNS = ("label", "labels", "class", "category")


def read_metadata(root: Path) -> tuple[str, dict[str, str]] | None:
    """Read the table of a folder, where there is one that states classes.

    Args:
        root: The folder.

    Returns:
        Where the labels come from, in words, and path of an image relative to the folder → its label as text;
        None without such a table.

    Raises:
        ImageDataError: There are two tables, or one cannot be read, or names an image outside the folder or one
            image twice with different labels.
    """
    if (root / "metadata.parquet").exists():
        raise ImageDataError(
            f"{root / 'metadata.parquet'} is a Parquet table", hint="write it as metadata.csv: file_name,label"
        )
    tables = [root / name for name in TABLES if (root / name).is_file()]
    if not tables:
        return _annotations(root / ANNOTATIONS) if (root / ANNOTATIONS).is_file() else None
    if len(tables) > 1:
        raise ImageDataError(f"{root} holds both {' and '.join(TABLES)}", hint="keep one of them")
    (table,) = tables
    labels: dict[str, str] = {}
    column = None
    for number, row in enumerate(_rows(table), 1):
        column = column or next((name for name in _COLUMNS if name in row), None)
        if column is None:
            return None
        place = f"{table}, row {number}"
        name = _contained(row.get("file_name"), place)
        label = _label(row.get(column), column, place)
        if labels.setdefault(name, label) != label:
            raise ImageDataError(
                f"{place}: {printable(name, 80)} has two labels, {labels[name]!r} and {label!r}",
                hint="keep one row for each image",
            )
    if not labels:
        raise ImageDataError(f"{table} has no rows", hint="write one row per image: file_name,label")
    return f"column {column} of {table.name}", labels


def _annotations(table: Path) -> tuple[str, dict[str, str]]:
    """Tiny ImageNet's own: file below ``images/``, WordNet id, and four edges of a box, by tabs, without a header."""
    labels: dict[str, str] = {}
    for number, line in enumerate(_text(table).splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise ImageDataError(f"{table}, line {number}: no tab", hint="each line is: file, tab, class")
        place = f"{table}, line {number}"
        labels[f"images/{_contained(fields[0], place)}"] = _label(fields[1], "the second field", place)
    if not labels:
        raise ImageDataError(f"{table} has no lines", hint="unpack Tiny ImageNet again")
    return table.name, labels


def _text(table: Path) -> str:
    try:
        with table.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES >> 20} MiB")
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageDataError(
            f"{table} cannot be read: {reason}", hint="write one row per image: file_name,label"
        ) from None


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    text = _text(table)
    try:
        if table.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            header = reader.fieldnames or []
            if len(set(header)) != len(header) or "file_name" not in header:
                raise ValueError("its first line must name each column once, file_name among them")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"line {reader.line_num} has another number of fields than the first")
                yield row
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                parsed = json.loads(line)
                if not isinstance(parsed, dict):
                    raise ValueError(f"line {number} is not an object")
                yield parsed
    except (ValueError, RecursionError, csv.Error) as error:
        raise ImageDataError(
            f"{table} cannot be read: {error}", hint="write one row per image: file_name,label"
        ) from None


def _contained(name: Any, place: str) -> str:
    if not isinstance(name, str) or not name or "\0" in name:
        raise ImageDataError(f"{place}: file_name is {printable(repr(name), 60)}", hint="give each row its image")
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\")) or ".." in parts or not parts or ":" in parts[0]:
        raise ImageDataError(
            f"{place}: {printable(name, 80)!r} leads out of the folder", hint="names are relative to the table"
        )
    return "/".join(parts)


def _label(value: Any, column: str, place: str) -> str:
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ImageDataError(f"{place}: {column} is {printable(repr(value), 60)}", hint="a name or an index is a label")
    return value.strip()
