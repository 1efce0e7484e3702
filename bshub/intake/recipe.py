"""The recipe in a sanitized model's ``config.json``: what differs from the library's own network.

A pruned model is rebuilt from the library's constructor, these attributes and the tensors of the checkpoint:
every narrowed tensor takes the shape it has in the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bshub.errors import CheckpointError
from bshub.intake.refill import refill

MAX_WIDTH = 10**6  # of one axis
MAX_KEPT = 2 * 10**7  # of all; a few bytes of JSON can name a million
_AGAIN = "fetch the model again from where it was published, or sanitize the original again"


@dataclass(frozen=True)
class Recipe:
    """What surgery changed.

    Attributes:
        attributes: Module → attribute → new value.
        kept: Parameter → axis → original indices that stayed.
        stem: ``cifar`` where the stem was replaced before any surgery.
        refilled: Module that slides along its channels → (axis, width before, indices that stay).
    """

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    stem: str | None = None
    refilled: dict[str, tuple[int, int, list[int]]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The ``bshub`` key of ``config.json``; indices are written as ranges, ``[first, last]`` pairs flattened."""
        kept = {name: {str(axis): _ranges(index) for axis, index in axes.items()} for name, axes in self.kept.items()}
        refilled = {name: [axis, width, *_ranges(index)] for name, (axis, width, index) in self.refilled.items()}
        return {
            "format": 1,
            "stem": self.stem,
            "attributes": self.attributes,
            "kept": kept,
            **({"refilled": refilled} if refilled else {}),
        }

    def then(
        self,
        attributes: dict[str, dict[str, Any]],
        kept: dict[str, dict[int, list[int]]],
        refilled: Mapping[str, tuple[int, int, list[int]]] | None = None,
    ) -> Recipe:
        """This recipe followed by another surgery, whose indices count what this one left.

        A module is refilled once: afterwards its channels are pinned by the hooks around it.
        """
        merged = {module: dict(values) for module, values in self.attributes.items()}
        for module, values in attributes.items():
            merged.setdefault(module, {}).update(values)
        total = {name: dict(axes) for name, axes in self.kept.items()}
        for name, axes in kept.items():
            for axis, index in axes.items():
                before = total.setdefault(name, {}).get(axis)
                total[name][axis] = [before[i] for i in index] if before else list(index)
        return Recipe(merged, total, self.stem, {**self.refilled, **(refilled or {})})

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """Read the key back.

        Raises:
            CheckpointError: It is not a recipe.
        """
        try:
            if data.get("format") not in (None, 1) or data.get("stem") not in (None, "cifar"):
                raise ValueError("written by a newer bshub")
            attributes = {str(m): {str(k): v for k, v in a.items()} for m, a in data.get("attributes", {}).items()}
            given, places = data.get("kept", {}), data.get("refilled", {})
            count = sum(_size(ranges) for axes in given.values() for ranges in axes.values())
            if count + sum(_size(numbers[2:]) for numbers in places.values()) > MAX_KEPT:
                raise ValueError(f"more than {MAX_KEPT} kept indices")
            kept = {
                str(name): {int(axis): _expand(ranges) for axis, ranges in axes.items()} for name, axes in given.items()
            }
            refilled = {str(name): _places(numbers) for name, numbers in places.items()}
            return cls(attributes, kept, data.get("stem"), refilled)
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"the bshub recipe in config.json cannot be used: {error}",
                hint=_AGAIN,
            ) from None


def replace_stem(model: nn.Module) -> None:
    """Give a network the usual CIFAR stem, in place: first convolution 3x3 stride 1, first max pooling gone.

    Raises:
        CheckpointError: The network has no 2-D convolution.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            new = nn.Conv2d(
                module.in_channels, module.out_channels, 3, stride=1, padding=1, bias=module.bias is not None
            )
            model.set_submodule(name, new)
            break
    else:
        raise CheckpointError("stem=cifar needs a network with a convolution", hint="leave stem=cifar away")
    for name, module in model.named_modules():
        if isinstance(module, nn.MaxPool2d):
            model.set_submodule(name, nn.Identity())
            break


def apply_recipe(model: nn.Module, recipe: Recipe, state: Mapping[str, Tensor]) -> None:
    """Shape a freshly built network like the checkpoint, in place; values come with the weights afterwards.

    Raises:
        CheckpointError: The recipe names something the network does not have.
    """
    for module_name, attributes in recipe.attributes.items():
        try:
            module = model.get_submodule(module_name)
        except AttributeError:
            raise CheckpointError(
                f"the recipe names a module {module_name!r} that the network lacks",
                hint=_AGAIN,
            ) from None
        for name, value in attributes.items():
            if not _sound(name, vars(module).get(name), value):
                raise CheckpointError(
                    f"the recipe cannot set {module_name}.{name} to {value!r}",
                    hint=_AGAIN,
                )
            current = getattr(module, name)
            setattr(module, name, tuple(value) if isinstance(current, tuple) else value)
    for module_name, places in recipe.refilled.items():
        try:
            refill(model.get_submodule(module_name), *places)
        except AttributeError:
            raise CheckpointError(
                f"the recipe names a module {module_name!r} that the network lacks",
                hint=_AGAIN,
            ) from None
    for name in recipe.kept:
        owner, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            raise CheckpointError(
                f"the recipe names a tensor {name!r} that the network lacks",
                hint=_AGAIN,
            ) from None
        if name not in state and leaf in module._non_persistent_buffers_set:
            _cut_buffer(module, leaf, recipe.kept[name])  # rebuilt by the constructor, at its full width
            continue
        if name not in state:
            raise CheckpointError(
                f"the recipe's tensor {name!r} is missing from the checkpoint",
                hint=_AGAIN,
            )
        shape = state[name].shape
        if leaf in module._parameters and module._parameters[leaf] is not None:
            dtype = module._parameters[leaf].dtype  # type: ignore[union-attr]
            module._parameters[leaf] = nn.Parameter(torch.zeros(shape, dtype=dtype))
        elif leaf in module._buffers and module._buffers[leaf] is not None:
            module._buffers[leaf] = torch.zeros(shape, dtype=module._buffers[leaf].dtype)  # type: ignore[union-attr]
        else:
            raise CheckpointError(
                f"the recipe names a tensor {name!r} that the network lacks",
                hint=_AGAIN,
            )


def _places(numbers: list[int]) -> tuple[int, int, list[int]]:
    """``[axis, width, *ranges]`` of a refilled module."""
    axis, width, index = numbers[0], numbers[1], _expand(numbers[2:])
    rising = all(a < b for a, b in itertools.pairwise(index))
    if type(axis) is not int or type(width) is not int or not (2 <= axis <= 4 and rising and index[-1] < width < 10**6):
        raise ValueError("refilled places out of range")
    return axis, width, index


def _cut_buffer(module: nn.Module, leaf: str, axes: dict[int, list[int]]) -> None:
    """Narrow a buffer that no checkpoint holds (a blur-pool kernel) to the kept indices."""
    buffer = module._buffers[leaf]
    for axis, index in axes.items():
        if buffer is None or not 0 <= axis < buffer.ndim or not index or index[-1] >= buffer.shape[axis]:
            raise CheckpointError(
                f"the recipe does not fit the buffer {leaf!r}",
                hint=_AGAIN,
            )
        buffer = buffer.index_select(axis, torch.tensor(index))
    module._buffers[leaf] = buffer


def _sound(name: str, current: Any, value: Any) -> bool:
    """Whether a recipe may set an attribute: a width, or a list of widths, that does not grow."""
    if type(current) is int:
        return type(value) is int and 0 < value <= current
    if name == "feature_info":
        return isinstance(current, list) and isinstance(value, list)
    sequences = isinstance(current, (list, tuple)) and isinstance(value, (list, tuple)) and len(current) == len(value)
    return sequences and all(_sound("", old, new) for old, new in zip(current, value, strict=True))


def _ranges(index: list[int]) -> list[int]:
    """``[0, 1, 2, 5]`` → ``[0, 2, 5, 5]``."""
    result: list[int] = []
    for i in index:
        if result and result[-1] == i - 1:
            result[-1] = i
        else:
            result += [i, i]
    return result


def _size(ranges: list[int]) -> int:
    """How many indices they name."""
    pairs = list(zip(ranges[::2], ranges[1::2], strict=True))
    size = sum(b - a + 1 for a, b in pairs)
    if any(not 0 <= a <= b < MAX_WIDTH for a, b in pairs) or size > MAX_WIDTH:
        raise ValueError("kept indices out of range")
    return size


def _expand(ranges: list[int]) -> list[int]:
    _size(ranges)
    return [i for a, b in zip(ranges[::2], ranges[1::2], strict=True) for i in range(a, b + 1)]
