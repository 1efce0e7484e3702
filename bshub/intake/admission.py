"""What a state dict must be before anything computes with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bshub.errors import CheckpointError, printable
from bshub.intake.header import MAX_BYTES, MAX_TENSORS

_DTYPES = frozenset(
    (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    + (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
)
# Plain weights before their moving average: the user asked for the model, not for its smoothed twin.
_CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "state_dict_ema", "model_ema")
# Tied weights share memory a few times over; a bomb does it thousands of times.
_MAX_SHARING = 4
_SHARING_SLACK = 64 << 20


def unwrap(loaded: object, *, origin: str = "checkpoint") -> dict[str, Tensor]:
    """Find the state dict in what a training script saved.

    Args:
        loaded: A state dict, or a dict that holds one as ``state_dict``, ``model``, ``net``, …, nested up to four deep.
        origin: Where it came from, for messages.

    Returns:
        The state dict; only its types are checked.

    Raises:
        CheckpointError: What is left is not a dict of tensors with text keys.
    """
    for _ in range(4):
        if not isinstance(loaded, dict):
            break
        inner = next((loaded[key] for key in _CONTAINERS if isinstance(loaded.get(key), dict)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, dict):
        _refuse(origin, f"holds a {type(loaded).__name__}, not a state dict")
    if not loaded:
        _refuse(origin, "holds no tensors")
    for key, value in loaded.items():
        if not isinstance(key, str):
            _refuse(origin, f"has the key {printable(repr(key), 80)}, and a state dict has text keys")
        if type(value) not in (Tensor, nn.Parameter):
            _refuse(origin, f"entry {_name(key)} is a {type(value).__name__}, not a tensor")
    return loaded


def admit(state: Mapping[str, Any], *, origin: str = "checkpoint") -> dict[str, Tensor]:
    """Check every tensor and give it memory of its own.

    Args:
        state: Tensor name → tensor.
        origin: Where it came from, for messages.

    Returns:
        The same tensors, detached and contiguous; those that shared memory are copied.

    Raises:
        CheckpointError: A tensor is sparse, quantized, complex, without data, larger than its storage, not finite,
            or a negative ``running_var``; or all together are too large. The first such tensor is named.
    """
    plain = unwrap(dict(state), origin=origin)
    if len(plain) > MAX_TENSORS:
        _refuse(origin, f"holds {len(plain)} tensors, more than {MAX_TENSORS}")
    total, storages = 0, dict[int, int]()
    for name, tensor in plain.items():
        _check_kind(name, tensor, origin)
        storage = tensor.untyped_storage()
        size = tensor.numel() * tensor.element_size()
        if size > storage.nbytes():
            _refuse(origin, f"tensor {_name(name)} claims {size} bytes of a {storage.nbytes()}-byte storage")
        total += size
        storages[storage.data_ptr()] = storage.nbytes()
    # Before any tensor is copied or summed: until here nothing large has been touched.
    if total > min(MAX_BYTES, _MAX_SHARING * sum(storages.values()) + _SHARING_SLACK):
        _refuse(origin, f"claims {total} bytes of tensors from {sum(storages.values())} bytes of storage")
    admitted: dict[str, Tensor] = {}
    owned: set[int] = set()
    for name, tensor in plain.items():
        _check_values(name, tensor.detach(), origin)
        own = tensor.detach().resolve_neg().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in owned or storage.nbytes() != own.numel() * own.element_size():
            own = own.clone()
        owned.add(own.untyped_storage().data_ptr())
        admitted[name] = own
    return admitted


def _check_kind(name: str, tensor: Tensor, origin: str) -> None:
    # A quantized, sparse or meta tensor has no storage to ask about, so its kind is settled first.
    kinds = {
        "without data (meta)": tensor.is_meta,
        "nested": tensor.is_nested,
        "sparse": tensor.layout != torch.strided,
        "quantized": tensor.is_quantized,
        "complex": tensor.is_complex(),
    }
    for kind, is_so in kinds.items():
        if is_so:
            _refuse(origin, f"tensor {_name(name)} is {kind}")
    if tensor.dtype not in _DTYPES:
        _refuse(origin, f"tensor {_name(name)} has dtype {str(tensor.dtype).removeprefix('torch.')}")


def _check_values(name: str, tensor: Tensor, origin: str) -> None:
    if tensor.is_floating_point():
        finite = torch.isfinite(tensor)
        if not finite.all():
            bad = tensor.numel() - int(finite.sum())
            _refuse(origin, f"tensor {_name(name)} holds NaN or Inf in {bad} of {tensor.numel()} places")
    if tensor.dtype == torch.bool and (tensor.view(torch.uint8) > 1).any():
        _refuse(origin, f"tensor {_name(name)} is boolean and holds other bytes than 0 and 1")
    if name.rpartition(".")[2] == "running_var" and (tensor < 0).any():
        _refuse(origin, f"tensor {_name(name)} is a variance and is negative: {tensor.min().item():g}")


def _name(name: str) -> str:
    return f"'{printable(name, 80)}'"


def _refuse(origin: str, what: str) -> NoReturn:
    raise CheckpointError(
        f"{printable(origin, 120)}: {what}",
        hint="save the plain weights: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')",
    )
