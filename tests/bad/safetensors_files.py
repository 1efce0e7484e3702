"""18 to 21: safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file

import bshub
from bad.bench import Bench, Case, Outcome
from bshub.errors import CheckpointError
from bshub.release.artifact import write_model


def entry(shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


def raw(header: object, data: bytes, length: int | None = None) -> Callable[[Bench], Outcome]:
    """A file of a header and bytes, with the length that the header claims to have."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + data
    return lambda bench: bench.sanitize(bench.put("m.safetensors", content))


ONE = {"a": entry([1], 0, 4)}
TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


def hostile_name(bench: Bench) -> Outcome:
    name = "../../x\0\x1b[2J"
    outcome = raw({name: entry([1], 0, 4)}, struct.pack("<f", float("nan")))(bench)
    assert "\x1b" not in outcome.text
    assert [path.name for path in bench.bad.rglob("*")] == ["m.safetensors"]
    return outcome


def shared_tensors(bench: Bench) -> Outcome:
    source = bshub.load(str(bench.model))
    blocks = dict(source.module.named_modules())
    source.module.layer1[0].bn2.weight = blocks["layer1.0.bn1"].weight  # tied: safetensors refuses such a dict
    folder = bench.bad / "saved"
    folder.mkdir()
    write_model(folder, source.module, source, source.origin.recipe)
    written = load_file(folder / "model.safetensors")
    assert written.keys() == source.module.state_dict().keys()
    assert torch.equal(written["layer1.0.bn2.weight"], written["layer1.0.bn1.weight"])
    return bench.command("evaluate", folder, "--test-dir", bench.clean)


REFUSED = CheckpointError
CASES = [
    Case(18, "header of 2⁶³ bytes", raw(ONE, bytes(4), 2**63), REFUSED, "a header of 9223372036854775808 bytes", 2),
    Case(18, "header of 200 MB", raw(ONE, bytes(4), 200_000_000), REFUSED, "a header of 200000000 bytes", 2),
    Case(19, "overlap", raw({**ONE, "b": entry([1], 0, 4)}, bytes(4)), REFUSED, "'b' overlaps another", 2),
    Case(19, "duplicate key", raw(TWICE, bytes(4)), REFUSED, "has the key 'a' twice", 2),
    Case(19, "trailing bytes", raw(ONE, bytes(5)), REFUSED, "1 trailing bytes", 2),
    Case(19, "truncation", raw(ONE, bytes(3)), REFUSED, "truncated", 2),
    Case(20, "hostile tensor name", hostile_name, REFUSED, r"'../../x\x00\x1b[2J' holds NaN", 2, silent=True),
    Case(21, "shared tensors", shared_tensors, says="accuracy %"),
]
