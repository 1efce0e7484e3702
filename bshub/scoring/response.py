"""How much each filter's map answers to a trigger: the trigger-activated change.

``TAC_k = mean over images of ‖a_k(x + trigger) - a_k(x)‖₂`` with ``a_k`` the map of channel ``k`` after batch norm and
activation (Zheng et al., *Data-free Backdoor Removal based on Channel Lipschitzness*, arXiv 2208.03111, section 3).
With the real trigger it is an oracle that judges scores; with an inverted one it is a score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bshub.copying import named_tensors
from bshub.graph.pairs import ConvBN, Pairing
from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.stream import activation_of, affine_of

Hook = Callable[[nn.Module, Any, Tensor], None]

BATCH = 100  # images per run, fewer where they are large: all maps of a run are held
PIXELS = 2**19  # per run


def trigger_response(
    model: nn.Module, pairing: Pairing, images: Tensor, labels: Tensor, trigger: InvertedTrigger
) -> dict[str, Tensor]:
    """TAC of every filter under an inverted trigger, in units of its layer's mean.

    Args:
        model: In evaluation mode.
        pairing: Its pairs.
        images: Clean, ``[n, c, h, w]``; those of a trigger's own class are left out.
        labels: ``[n]``.
        trigger: With its strength.

    Returns:
        Convolution → ``[out_channels]``.
    """
    others = images[labels != trigger.target] if bool((labels != trigger.target).any()) else images
    change = activated_change(model, pairing, others, trigger(others))
    return {name: value / value.mean().clamp_min(1e-12) for name, value in change.items()}


def strongest(responses: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The largest answer of each filter; in units of the layer's mean, so that no trigger drowns another.

    Args:
        responses: Of :func:`trigger_response`.

    Returns:
        Convolution → ``[out_channels]``; empty without any.
    """
    names = responses[0] if responses else ()
    return {name: torch.stack([response[name] for response in responses]).amax(0) for name in names}


def activated_change(model: nn.Module, pairing: Pairing, images: Tensor, stamped: Tensor) -> dict[str, Tensor]:
    """TAC of every filter: convolution → ``[out_channels]``.

    Args:
        model: In evaluation mode.
        pairing: Its pairs.
        images: ``[n, c, h, w]``.
        stamped: The same with the trigger.
    """
    total = {pair.name: torch.zeros(pair.out_channels) for pair in pairing.pairs}
    for part, changed in zip(_parts(images), _parts(stamped), strict=True):
        with torch.no_grad(), _maps(model, pairing) as maps:
            model(part)
            before = dict(maps)
            maps.clear()
            model(changed)
            for name, map_ in maps.items():
                total[name] += (map_ - before[name]).flatten(2).norm(dim=2).sum(0)  # (n, out, places) → (out,)
    return {name: value / len(images) for name, value in total.items()}


def mean_maps(model: nn.Module, pairing: Pairing, images: Tensor) -> dict[str, Tensor]:
    """Mean of every filter's map over its places, image by image: convolution → ``[n, out_channels]``.

    Args:
        model: In evaluation mode.
        pairing: Its pairs.
        images: ``[n, c, h, w]``, n > 0.
    """
    found: dict[str, list[Tensor]] = {pair.name: [] for pair in pairing.pairs}
    with torch.no_grad(), _maps(model, pairing, lambda map_: map_.flatten(2).mean(2)) as maps:
        for part in _parts(images):
            model(part)
            for name, means in maps.items():
                found[name].append(means)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _parts(images: Tensor) -> tuple[Tensor, ...]:
    height, width = images.shape[-2:]
    return images.split(min(BATCH, max(1, PIXELS // (height * width))))


@contextmanager
def _maps(
    model: nn.Module, pairing: Pairing, keep_of: Callable[[Tensor], Tensor] = lambda map_: map_
) -> Iterator[dict[str, Tensor]]:
    """Each pair's map after batch norm and activation, or what is to be kept of it, filled by every run."""
    named = named_tensors(model)
    maps: dict[str, Tensor] = {}

    def keeper(pair: ConvBN) -> Hook:
        affine, act = affine_of(pair, named), activation_of(pair)

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            shape = [1, -1, *[1] * (output.ndim - 2)]
            maps[pair.name] = keep_of(act(output * affine.scale.view(shape) + affine.shift.view(shape)))

        return keep

    with watching(model, pairing, keeper):
        yield maps


@contextmanager
def watching(model: nn.Module, pairing: Pairing, watcher: Callable[[ConvBN], Hook]) -> Iterator[None]:
    """A forward hook on the convolution of every pair, for as long as the context lasts.

    Args:
        model: The network.
        pairing: Its pairs.
        watcher: Pair → hook.
    """
    with ExitStack() as stack:
        for pair in pairing.pairs:
            handle = model.get_submodule(pair.name).register_forward_hook(watcher(pair))
            stack.callback(handle.remove)
        yield
