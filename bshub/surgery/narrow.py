"""Cut the planned indices out of a model's tensors and keep the numbers that mirror them true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from bshub.copying import named_tensors
from bshub.graph.coupling import ChannelFlow
from bshub.intake.refill import blank, refill
from bshub.scoring.plan import RemovalPlan, variables_gone
from bshub.surgery.mirrors import WIDTH_NAME, mirrored_attributes, settle


def zero_silenced(model: nn.Module, zeroed: Mapping[str, Sequence[int]]) -> None:
    """Silence the flagged filters that stay: rows, bias, batch-norm scale and shift become zero, in place."""
    tensors = named_tensors(model) if zeroed else {}
    with torch.no_grad():
        for name, index in zeroed.items():
            if name in tensors:  # a convolution before a batch norm rarely has a bias
                tensors[name][list(index)] = 0


def zero_columns(model: nn.Module, plan: RemovalPlan) -> None:
    """The oracle: zero the leaving slots at every consumer, in place, and nothing else."""
    tensors = named_tensors(model)
    with torch.no_grad():
        for name, axes in plan.columns.items():
            for axis, index in axes.items():
                tensors[name].index_fill_(axis, torch.tensor(index, device=tensors[name].device), 0)
    for name, places in plan.refilled.items():
        blank(model.get_submodule(name), *places)


def narrow(
    model: nn.Module, plan: RemovalPlan, flow: ChannelFlow, input_size: tuple[int, int, int]
) -> dict[str, dict[str, Any]]:
    """Remove the planned indices from every tensor, in place.

    Args:
        model: The network to shrink.
        plan: What leaves.
        flow: The channels, for attributes that mirror a width.
        input_size: ``(channels, height, width)``, for a trial run where an attribute has several candidates.

    Returns:
        Module → attribute → new value, for each plain attribute that had to follow.
    """
    replaced: dict[int, nn.Parameter] = {}  # a shared parameter stays shared
    indices: dict[tuple[int, torch.device], Tensor] = {}  # by list: many tensors keep the same places
    old_shapes: dict[str, dict[str, torch.Size]] = {}
    for owner_name, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for leaf, tensor in store.items():
                full = f"{owner_name}.{leaf}" if owner_name else leaf
                if tensor is None or full not in plan.kept:
                    continue
                old_shapes.setdefault(owner_name, {})[leaf] = tensor.shape
                if id(tensor) not in replaced:
                    smaller = _keep(tensor.detach(), plan.kept[full], indices)
                    if isinstance(tensor, nn.Parameter):
                        smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
                    replaced[id(tensor)] = smaller  # type: ignore[assignment]
                store[leaf] = replaced[id(tensor)]
    for name, places in plan.refilled.items():
        refill(model.get_submodule(name), *places)
    choices = mirrored_attributes(model, flow, variables_gone(flow, plan.kept))
    for owner_name, shapes in old_shapes.items():
        found = {name: [value] for name, value in _own_attributes(model.get_submodule(owner_name), shapes).items()}
        if found:
            choices.setdefault(owner_name, {}).update(found)
    before = {name: {key: vars(model.get_submodule(name)).get(key) for key in found} for name, found in choices.items()}
    settle(model, choices, input_size)
    changes = {name: _changed(found, before[name]) for name, found in choices.items()}
    return {name: found for name, found in changes.items() if found}


def _changed(found: dict[str, list[Any]], before: dict[str, Any]) -> dict[str, Any]:
    return {key: values[0] for key, values in found.items() if values[0] != before[key]}


def _keep(tensor: Tensor, axes: dict[int, list[int]], indices: dict[tuple[int, torch.device], Tensor]) -> Tensor:
    for axis, index in axes.items():
        key = id(index), tensor.device
        if key not in indices:
            indices[key] = torch.tensor(index, device=tensor.device)
        tensor = tensor.index_select(axis, indices[key])
    return tensor.contiguous()


def _own_attributes(module: nn.Module, old: dict[str, torch.Size]) -> dict[str, Any]:
    """New values of the numbers that describe a module's own tensors."""
    if isinstance(module, _ConvNd):
        weight = module.weight
        first, second = ("in", "out") if module.transposed else ("out", "in")
        sizes = {first: weight.shape[0], second: weight.shape[1]}
        before = old.get("weight", weight.shape)
        depthwise = module.groups > 1 and before[1] == 1
        # out // in stays the multiplier of a depthwise convolution; other groups keep their number
        groups = module.groups * weight.shape[0] // before[0] if depthwise else module.groups
        sizes[second] *= groups
        found = {"in_channels": sizes["in"], "out_channels": sizes["out"], "groups": groups}
    elif isinstance(module, _NormBase):
        tensor = next(t for t in (module.weight, module.running_mean, module.bias) if t is not None)
        found = {"num_features": len(tensor)}
    elif isinstance(module, nn.Linear):
        found = {"in_features": module.weight.shape[1], "out_features": module.weight.shape[0]}
    else:
        found = {}
        for leaf, shape in old.items():
            now = getattr(module, leaf).shape
            for was, size in zip(shape, now, strict=True):
                for attribute, value in vars(module).items():
                    if type(value) is int and value == was != size and WIDTH_NAME.search(attribute):
                        found[attribute] = size
    return {name: value for name, value in found.items() if getattr(module, name) != value}
