"""The stages of any CNN: the last feature map at each spatial resolution, found in a run and not by name.

Residual networks have stages of that kind by construction; elsewhere (VGG, DenseNet, MobileNet) the last map before
the resolution falls plays the same part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bshub.graph.trace import in_mode


@dataclass(frozen=True)
class Stage:
    """A feature map: what ``module`` gives back when it runs for the ``call``-th time (from 0)."""

    module: str
    call: int


def find_stages(model: nn.Module, images: Tensor, count: int) -> list[Stage]:
    """The last maps at the ``count`` smallest resolutions of the network.

    Resolutions are those of the convolutions' outputs; a 1 x 1 map has no places to attend to and is left out.

    Args:
        model: The network; left as it was.
        images: ``[n, c, h, w]``, a few are enough.
        count: How many.

    Returns:
        At most ``count`` stages, in falling resolution; fewer where the network has fewer resolutions.
    """
    last: dict[tuple[int, int], Stage] = {}
    resolutions: set[tuple[int, int]] = set()
    names = {id(module): name for name, module in model.named_modules()}

    def see(module: nn.Module, stage: Stage, output: Tensor) -> None:
        height, width = output.shape[2:]
        last[height, width] = stage
        if isinstance(module, _ConvNd) and height * width > 1:
            resolutions.add((height, width))

    with in_mode(model, False), torch.no_grad(), _watching(model, names, see):
        model(images[:1])
    smallest = sorted(resolutions, key=lambda size: size[0] * size[1])[:count]
    return [last[size] for size in reversed(smallest)]


def run_with_stages(model: nn.Module, images: Tensor, stages: Sequence[Stage]) -> tuple[Any, list[Tensor]]:
    """The model's answer and the maps of the stages, ``[n, channels, h, w]`` each, differentiable."""
    maps: dict[Stage, Tensor] = {}
    names = {id(model.get_submodule(stage.module)): stage.module for stage in stages}

    def see(module: nn.Module, stage: Stage, output: Tensor) -> None:
        maps[stage] = output

    with _watching(model, names, see):
        answer = model(images)
    return answer, [maps[stage] for stage in stages]


@contextmanager
def _watching(model: nn.Module, names: dict[int, str], see: Any) -> Iterator[None]:
    """Call ``see(module, stage, output)`` for each four-dimensional output of the named modules."""
    calls: dict[str, int] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        name = names[id(module)]
        call = calls.get(name, 0)
        calls[name] = call + 1
        if isinstance(output, Tensor) and output.ndim == 4:
            see(module, Stage(name, call), output)

    handles = [module.register_forward_hook(note) for module in model.modules() if id(module) in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
