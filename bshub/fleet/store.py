"""Where a fleet's results lie, on any file system that fsspec knows: ``records/KEY.json`` and ``models/NAME-KEY/``.

A record is written in one step when everything about its model is in place, so that what has a record is done, and
what has none is not. An artifact goes up file by file with its manifest last.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from bshub.errors import OutputError, printable
from bshub.files import MANIFEST


class Store:
    """One output place.

    Args:
        place: A folder, or a URL such as ``s3://bucket/prefix`` or ``memory://fleet``.

    Raises:
        OutputError: No file system answers to it.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        try:
            self._files, self._root = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError, OSError) as error:
            raise OutputError(
                f"{place} cannot be written to: {printable(error)}",
                hint="an object store needs its fsspec package, for s3:// s3fs",
            ) from None
        self.local: Path | None = Path(self._root) if isinstance(self._files, LocalFileSystem) else None

    def path(self, *parts: str) -> str:
        """The full path of something below."""
        return "/".join([self._root.rstrip("/"), *parts])

    def record(self, key: str) -> dict[str, Any] | None:
        """What was written down for a key; None where nothing (whole) was."""
        found = self._json("records", f"{key}.json")
        return found if found and found.get("key") == key else None

    def write_record(self, row: dict[str, Any]) -> None:
        """Write a record in one step."""
        self.write(json.dumps(row, indent=1, allow_nan=False).encode(), "records", f"{row['key']}.json")

    def write(self, data: bytes, *parts: str) -> None:
        """Write a file in one step: an object appears whole anyway, a local file by a rename.

        Raises:
            OutputError: It cannot be written.
        """
        try:
            if self.local is None:
                self._files.pipe_file(self.path(*parts), data)
                return
            path = Path(self.path(*parts))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            raise OutputError(f"writing into {self.place} failed: {printable(error)}", hint="then rerun") from None

    def manifest(self, folder: str) -> dict[str, Any] | None:
        """The report of an artifact that lies there whole."""
        return self._json("models", folder, MANIFEST)

    def _json(self, *parts: str) -> dict[str, Any] | None:
        """An object that lies there whole, or None."""
        try:
            found = json.loads(self._files.cat_file(self.path(*parts)))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def upload(self, source: Path, folder: str) -> None:
        """Copy an artifact up, its manifest last.

        Raises:
            OutputError: It cannot be written.
        """
        files = sorted(
            (path for path in source.rglob("*") if path.is_file()), key=lambda path: (path.name == MANIFEST, path)
        )
        try:
            for path in files:
                name = path.relative_to(source).as_posix()
                target = self.path("models", folder, name)
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), target)
        except OSError as error:
            raise OutputError(f"uploading to {self.place} failed: {printable(error)}", hint="then rerun") from None
