"""Copy a network and share what need not be copied: ``copy.deepcopy`` several times faster.

Most of what a module holds is empty (hooks) or cannot change (numbers, names). Only the rest goes through
``copy.deepcopy``, with one memo, so that whatever two places share stays shared in the copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

FIXED = frozenset(
    {int, float, complex, bool, str, bytes, NoneType, torch.dtype, torch.device, torch.Size, FunctionType,
     BuiltinFunctionType, type}
)  # fmt: skip
PLAIN_SETSTATE = (nn.Module.__setstate__, _ConvNd.__setstate__)  # they only fill in what old pickles lack
HOLDERS = frozenset({dict, OrderedDict, list, set})


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def copy_sharing(model: nn.Module, shared: Callable[[str], bool]) -> nn.Module:
    """A copy in evaluation mode.

    Args:
        model: The network.
        shared: Whether the tensor of this name is not copied but used by both: nobody will write into it, or it is
            replaced right away. A tensor with several names is shared only if all of them are.

    Returns:
        The copy.
    """
    tensors = named_tensors(model)
    own = {id(tensor) for name, tensor in tensors.items() if not shared(name)}
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors.values() if id(tensor) not in own}
    return _module(model, memo).eval()


def _module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    kind = type(module)
    if _unusual(kind):
        return copy.deepcopy(module, memo)
    made: nn.Module = kind.__new__(kind)
    memo[id(module)] = made
    state = made.__dict__
    for key, value in vars(module).items():
        if key == "_modules":
            state[key] = type(value)((name, child and _module(child, memo)) for name, child in value.items())
        elif key == "_parameters" or key == "_buffers":
            state[key] = type(value)((name, _tensor(tensor, memo)) for name, tensor in value.items())
        elif key != "_compiled_call_impl":  # of the original's shapes
            state[key] = _plain(value, memo)
    return made


def _unusual(kind: type) -> bool:
    """Whether a class has a say of its own in how it is copied."""
    return (
        hasattr(kind, "__deepcopy__")
        or kind.__reduce_ex__ is not object.__reduce_ex__
        or kind.__getstate__ is not nn.Module.__getstate__
        or kind.__setstate__ not in PLAIN_SETSTATE  # type: ignore[attr-defined]
    )


def _tensor(tensor: Tensor | None, memo: dict[int, Any]) -> Tensor | None:
    if tensor is None:
        return None
    found = memo.get(id(tensor))
    return copy.deepcopy(tensor, memo) if found is None else found


def _plain(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in FIXED or (kind is tuple and all(type(item) in FIXED for item in value)):
        return value
    if kind in HOLDERS and not value and id(value) not in memo:
        memo[id(value)] = made = kind()
        memo.setdefault(id(memo), []).append(value)  # as deepcopy does: the id must not be given away meanwhile
        return made
    return copy.deepcopy(value, memo)
