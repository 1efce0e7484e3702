"""Hooks that give a module zeros back at the places of channels that left.

A convolution that slides along the channels (the gate of ECA) reads neighbours: its result at a channel that stays
depends on the zeros beside it. So the module sees its input at the old width and gives its output at the new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Widen:
    """Pre-hook: ``(…, kept, …)`` → ``(…, width, …)`` with zeros at the places that left."""

    axis: int
    width: int
    kept: tuple[int, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Spread the first argument."""
        x: Tensor = args[0]
        shape = [*x.shape[: self.axis], self.width, *x.shape[self.axis + 1 :]]
        return (x.new_zeros(shape).index_copy(self.axis, torch.tensor(self.kept, device=x.device), x), *args[1:])


@dataclass(frozen=True)
class Pick:
    """Hook: ``(…, width, …)`` → ``(…, kept, …)``."""

    axis: int
    kept: tuple[int, ...]

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Take the places that stayed."""
        return output.index_select(self.axis, torch.tensor(self.kept, device=output.device))


@dataclass(frozen=True)
class Blank:
    """Pre-hook of the masked model: zeros at the leaving places, nothing narrowed."""

    axis: int
    lost: tuple[int, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Zero the leaving places of the first argument."""
        x: Tensor = args[0]
        return (x.index_fill(self.axis, torch.tensor(self.lost, device=x.device), 0), *args[1:])


def refill(module: nn.Module, axis: int, width: int, kept: list[int]) -> None:
    """Put both hooks around a module."""
    module.register_forward_pre_hook(Widen(axis, width, tuple(kept)))
    module.register_forward_hook(Pick(axis, tuple(kept)))


def blank(module: nn.Module, axis: int, width: int, kept: list[int]) -> None:
    """Zero what :func:`refill` would replace by zeros."""
    module.register_forward_pre_hook(Blank(axis, tuple(sorted(set(range(width)) - set(kept)))))
