"""The safetensors header, checked before the library sees the bytes, and the caps that all of intake shares.

The library takes a duplicate key silently (the last one wins) and meets a dtype that it does not know with a
``KeyError``. The layout is: 8 bytes little-endian length, that many bytes of JSON, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from bshub.errors import CheckpointError, printable

MAX_BYTES = 8 << 30
MAX_TENSORS = 100_000
# The format allows 100 MB; a header of MAX_TENSORS entries needs a tenth, and parsing costs ten times its size.
MAX_HEADER = 16 << 20
MAX_RANK = 16

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def check_header(data: bytes, origin: str) -> set[str]:
    """Check a safetensors file's header against its bytes.

    Args:
        data: The whole file.
        origin: The file's name, for messages.

    Returns:
        The tensor names.

    Raises:
        CheckpointError: The header is too long, no JSON, has a key twice, or does not cover the data exactly once.
    """
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        _refuse(origin, f"declares a header of {length} bytes, more than {MAX_HEADER}")
    if 8 + length > len(data):
        _refuse(origin, f"truncated: its header needs {8 + length} bytes and the file has {len(data)}")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        _refuse(origin, f"has the key {_name(error.args[0])} twice")
    except (ValueError, RecursionError):
        _refuse(origin, "header is not JSON")
    if not isinstance(header, dict):
        _refuse(origin, "header is not a JSON object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        _refuse(origin, f"lists {len(header)} tensors, more than {MAX_TENSORS}")
    spans = sorted((*_span(name, entry, origin), name) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            _refuse(origin, f"tensor {_name(name)} {'overlaps another' if start < end else 'leaves a gap before it'}")
        end = stop
    held = len(data) - 8 - length
    if end > held:
        _refuse(origin, f"truncated: its tensors need {end} bytes and the file holds {held}")
    if end < held:
        _refuse(origin, f"has {held - end} trailing bytes that belong to no tensor")
    return set(header)


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        found[key] = value
    return found


def _span(name: str, entry: object, origin: str) -> tuple[int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(origin, f"entry {_name(name)} is not a tensor description")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        _refuse(origin, f"tensor {_name(name)} has dtype {printable(dtype, 20)}, which no CNN weight has")
    if not _naturals(shape) or len(shape) > MAX_RANK:
        _refuse(origin, f"tensor {_name(name)} has no valid shape")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _SIZES[dtype]:
        _refuse(origin, f"tensor {_name(name)} does not fit its data_offsets")
    return offsets[0], offsets[1]


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _name(name: object) -> str:
    return f"'{printable(name, 80)}'"


def _refuse(origin: str, what: str) -> NoReturn:
    raise CheckpointError(f"{origin}: safetensors {what}", hint="fetch it again, or ask its author for a sound file")
