"""Fine-pruning: cut the last convolution's channels that clean images leave idle, then fine-tune.

1. ``a_c = mean over clean images and places of channel c``, where the classifier reads the last feature map.
2. Channels are silenced in the order of rising ``a_c``, 1 % of them at a time, for as long as
   ``(ACC_0 - ACC) / ACC_0 < tolerance`` on the clean images.
3. ``min_θ mean_i CE(f_θ(a(x_i)), y_i)`` with the silenced channels held at zero.

Source: arXiv 1805.12185, sections 4.1 to 4.3. Hyper-parameters of BackdoorBench's ``config/defense/fp``: tolerance
0.1 (relative), 1 % a time, then its fine-tuning: 100 epochs, SGD lr 0.01 along a cosine, momentum 0.9, weight decay
5e-4, batch size 256 there, ``settings.batch_size`` here.

A channel is silenced where it is made and where it is read: γ = β = 0 in the last batch norm that writes it, and
zero columns in the layer that reads it, because a shortcut may carry it past that batch norm. Channels are told by
the recorded data flow; those that only move together (a channel shuffle) count as one.

Deviations: accuracy is counted on the clean images that the defender has (BackdoorBench counts it on the test
set), and only a fall of it stops the pruning. With ten images an epoch is one step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bshub.clean import CleanImages
from bshub.errors import InconclusiveError
from bshub.evaluation.defenses.ft import finetune
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.training import working_copy
from bshub.evaluation.metrics import clean_accuracy
from bshub.graph.coupling import ChannelFlow, follow_channels
from bshub.graph.trace import in_mode


@dataclass(frozen=True)
class LastChannels:
    """The channels of the last feature map.

    Attributes:
        reader: Module that reads them.
        columns: Channel → the inputs of the reader that it fills (several where a map is flattened).
        norms: Channel → rows of the last batch norm that writes it, as (parameter, row).
    """

    reader: str
    columns: list[list[int]]
    norms: list[list[tuple[str, int]]]


def fine_pruning(
    model: nn.Module,
    clean: CleanImages,
    settings: DefenseSettings,
    *,
    tolerance: float = 0.1,
    share: float = 0.01,
    epochs: int = 100,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> nn.Module:
    """Prune idle channels, then fine-tune.

    Args:
        model: The network; not changed.
        clean: The clean images.
        settings: Seed, batch size, effort.
        tolerance: Share of the clean accuracy that pruning may cost.
        share: Share of the channels that is silenced at a time.
        epochs: Passes over the images afterwards.
        lr: Learning rate of the first epoch.
        momentum: Of SGD.
        weight_decay: Of SGD.

    Returns:
        The pruned and fine-tuned copy, same shapes.

    Raises:
        InconclusiveError: No layer reads channels that a batch norm writes.
        TraceError: The model does not run.
    """
    clean.drain()
    with working_copy(model, settings) as (student, generator):
        channels = find_last_channels(student, follow_channels(student, clean.input_size)[0], clean.images[:1])
        order = torch.argsort(activations(student, channels, clean, settings), stable=True).tolist()
        silenced = order[: _how_many(student, channels, order, clean, settings, tolerance, share)]

        def hold() -> None:
            silence(student, channels, silenced)

        hold()
        finetune(
            student,
            clean,
            settings,
            generator,
            epochs=epochs,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            after_step=hold,
        )
    return student


def find_last_channels(model: nn.Module, flow: ChannelFlow, images: Tensor) -> LastChannels:
    """What the classifier reads: the inputs of the last layer that takes channels of a batch norm.

    Args:
        model: The network.
        flow: Its channels.
        images: ``[n, c, h, w]``, for one run that says which layer comes after which.

    Returns:
        Where the channels are made and read.

    Raises:
        InconclusiveError: There is no such layer.
    """
    axes, groups = flow.channels.axes, flow.groups
    written: dict[int, list[tuple[str, int]]] = {}  # group → rows of the last norm that holds it
    for norm in flow.norms:
        rows: dict[int, list[tuple[str, int]]] = {}
        for parameter in filter(None, (norm.weight, norm.bias)):
            for row, group in enumerate(groups[axes[parameter][0]].tolist()):
                rows.setdefault(group, []).append((parameter, row))
        written |= rows
    for name in reversed(_execution_order(model, images)):
        weight = f"{name}.weight"
        if len(axes.get(weight, ())) < 2:
            continue
        columns: dict[int, list[int]] = {}
        for column, group in enumerate(groups[axes[weight][1]].tolist()):
            columns.setdefault(group, []).append(column)
        known = [group for group in columns if group in written]
        if known and getattr(model.get_submodule(name), "groups", 1) == 1:
            return LastChannels(name, [columns[group] for group in known], [written[group] for group in known])
    raise InconclusiveError(
        "no layer reads channels that a batch norm writes: there is nothing to prune by activation",
        hint="choose another --method: bshub sanitize --help lists them",
    )


def activations(model: nn.Module, channels: LastChannels, clean: CleanImages, settings: DefenseSettings) -> Tensor:
    """Mean of each channel over the clean images and its places, as the reader gets it: ``[channels]``.

    Args:
        model: The network.
        channels: Where the classifier reads them.
        clean: Clean images.
        settings: Batch size and progress.

    Returns:
        ``[channels]``.
    """
    reader = model.get_submodule(channels.reader)
    axis = -1 if reader.weight.ndim == 2 else 1  # type: ignore[union-attr, operator]
    sums: list[Tensor] = []

    def see(module: nn.Module, args: Any) -> None:
        inputs = args[0].movedim(axis, 0).flatten(1)  # (columns, images · places)
        sums.append(inputs.sum(1) * (len(args[0]) / inputs.shape[1]))

    handle = reader.register_forward_pre_hook(see)
    try:
        with in_mode(model, False), torch.no_grad():
            for images, _ in clean.batches(settings.batch_size):
                model(images)
    finally:
        handle.remove()
    mean = torch.stack(sums).sum(0).cpu() / len(clean.images)
    return torch.stack([mean[columns].mean() for columns in channels.columns])


def silence(model: nn.Module, channels: LastChannels, chosen: list[int]) -> None:
    """Zero the chosen channels where they are made and where they are read, in place.

    Args:
        model: The network; changed.
        channels: Where they are made and read.
        chosen: Indices of the channels.
    """
    if not chosen:
        return
    rows: dict[str, list[int]] = {}
    for channel in chosen:
        for parameter, row in channels.norms[channel]:
            rows.setdefault(parameter, []).append(row)
    columns = np.concatenate([channels.columns[channel] for channel in chosen])
    with torch.no_grad():
        for parameter, index in rows.items():
            model.get_parameter(parameter)[index] = 0
        model.get_parameter(f"{channels.reader}.weight")[:, torch.from_numpy(columns)] = 0


def _how_many(
    model: nn.Module,
    channels: LastChannels,
    order: list[int],
    clean: CleanImages,
    settings: DefenseSettings,
    tolerance: float,
    share: float,
) -> int:
    """The longest prefix of ``order`` within the tolerance, in steps of ``share``; the model is as before then."""
    touched = {f"{channels.reader}.weight", *(name for rows in channels.norms for name, _ in rows)}
    before = {name: model.get_parameter(name).detach().clone() for name in touched}
    batches = clean.batches(settings.batch_size)
    unpruned = clean_accuracy(model, batches).value
    good, step = 0, math.ceil(share * len(order))
    for count in range(step, len(order), step):
        silence(model, channels, order[:count])
        settings.progress(1)
        if unpruned - clean_accuracy(model, batches).value >= tolerance * unpruned:
            break
        good = count
    with torch.no_grad():
        for name, value in before.items():
            model.get_parameter(name).copy_(value)
    return good


def _execution_order(model: nn.Module, images: Tensor) -> list[str]:
    """Modules in the order in which they first finish, in evaluation mode."""
    names: Mapping[int, str] = {id(module): name for name, module in model.named_modules()}
    order: list[str] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if names[id(module)] not in order:
            order.append(names[id(module)])

    handles: list[Any] = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with in_mode(model, False), torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return order
