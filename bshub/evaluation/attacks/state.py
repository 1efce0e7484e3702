"""What a training run keeps on disk to be continued: one safetensors file and the JSON that names it.

``state.json`` is written last and atomically, so that a run killed at any moment continues after its last whole epoch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bshub.errors import BshubError, OutputError
from bshub.intake.checkpoint import read_checkpoint

RECORD, CLAIM = "state.json", "settings.json"


def save_state(folder: Path, epoch: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Keep the state after ``epoch`` finished epochs; the one before it goes.

    Args:
        folder: Made if missing.
        epoch: Names the file.
        tensors: Networks and optimizers.
        record: JSON beside them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"epoch-{epoch}.safetensors"
    _save(folder / name, tensors)
    _replace(folder / RECORD, json.dumps({**record, "epoch": epoch, "tensors": name}, indent=1).encode())
    for old in folder.glob("epoch-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The kept record and tensors, or None where there are none.

    Raises:
        OutputError: They cannot be read.
    """
    if not (folder / RECORD).is_file():
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        name = Path(str(record["tensors"])).name
        return record, read_checkpoint(folder / name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, BshubError) as error:
        raise OutputError(
            f"the unfinished training in {folder} cannot be read: {error}", hint="start anew with --overwrite"
        ) from None


def pack(parts: dict[str, nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Networks and what their optimizers remember, as named tensors.

    Args:
        parts: Networks by name.
        optimizers: Of their parameters.

    Returns:
        ``part.tensor`` → value, and ``key:part.parameter`` → value of an optimizer.
    """
    tensors = {f"{part}.{name}": value for part, net in parts.items() for name, value in net.state_dict().items()}
    names = {parameter: name for name, parameter in _parameters(parts).items()}
    for optimizer in optimizers:
        for parameter, memory in optimizer.state.items():
            tensors |= {f"{key}:{names[parameter]}": value for key, value in memory.items() if value is not None}
    return tensors


def unpack(
    tensors: dict[str, Tensor], parts: dict[str, nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Put what :func:`pack` gave back into networks and optimizers, in place."""
    for part, net in parts.items():
        prefix = f"{part}."
        net.load_state_dict({key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)})
    parameters = _parameters(parts)
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for key, value in tensors.items():
        what, colon, name = key.partition(":")
        if colon:
            parameter = parameters[name]
            # the parameter's own layout in memory: another could round differently
            fits = value.shape == parameter.shape
            restored = torch.empty_like(parameter).copy_(value) if fits else value
            owner[parameter].state[parameter][what] = restored.detach()


def _parameters(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{part}.{name}": parameter for part, net in parts.items() for name, parameter in net.named_parameters()}


def claim(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Begin a run in a folder, or continue the one that began there with the very same settings.

    Raises:
        OutputError: An unfinished run with other settings lies there.
    """
    path, text = folder / CLAIM, json.dumps(fingerprint, indent=1, sort_keys=True)
    if folder.is_dir() and any(folder.iterdir()) and (not path.is_file() or path.read_text(encoding="utf-8") != text):
        raise OutputError(
            f"{folder} holds an unfinished training with other settings",
            hint="finish it with its own command, or add --overwrite to start anew",
        )
    folder.mkdir(parents=True, exist_ok=True)
    _replace(path, text.encode())


def unclaim(folder: Path) -> None:
    """Leave no folder behind that holds nothing to continue."""
    if folder.is_dir() and [path.name for path in folder.iterdir()] == [CLAIM]:
        shutil.rmtree(folder)


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that are expensive to make: made once, kept in a safetensors file until the run ends."""
    if not path.is_file():
        tensors = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(path, tensors)
        return tensors
    return read_checkpoint(path)


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, temporary)
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
