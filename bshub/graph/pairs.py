"""Which batch norm normalises which filter: from the data flow, never from registration order.

A filter and a batch-norm channel form a pair when the filter's output values arrive at that channel unchanged
or only moved (concatenated, cut, passed through a zero-preserving activation). A convolution may feed several
batch norms (DenseNet's growth channels), a batch norm several convolutions; a residual sum in between breaks
the pair, because the channel no longer belongs to one filter.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from bshub.graph.channels import Ints
from bshub.graph.coupling import ChannelFlow, Normalised, op_name

# Activations that may follow a batch norm: ATen name → out-of-place operation.
ACTIVATIONS = {"relu", "relu6", "hardtanh", "silu", "gelu", "hardswish", "mish", "leaky_relu", "elu"}


@dataclass(frozen=True)
class Reader:
    """A batch norm that reads filters of one convolution: ``filters[k]`` arrives at ``channels[k]``.

    ``activation`` is the ATen name and the further arguments of the activation that follows, if one does.
    """

    norm: Normalised
    filters: Ints
    channels: Ints
    activation: tuple[str, tuple[Any, ...]] | None


@dataclass(frozen=True)
class ConvBN:
    """A convolution with the batch norms of its filters.

    Attributes:
        name: Qualified name of the convolution module.
        out_channels: Number of filters.
        slots: Variable of each filter, ``[out_channels]``.
        values: Value ids of each filter's output, ``[runs, out_channels]`` (a shared module runs several times).
        readers: The batch norms.
        paired: Whether each filter has a batch norm, ``[out_channels]``.
        rows: Whether filter ``o`` is row ``o`` of the weights (not so in a transposed convolution); only then can the
            filter itself become zero, else its batch norm alone is silenced.
    """

    name: str
    out_channels: int
    slots: Ints
    values: Ints
    readers: tuple[Reader, ...]
    paired: np.ndarray
    rows: bool


@dataclass(frozen=True)
class Pairing:
    """All pairs, in execution order, and a reason for every convolution without one.

    ``bare`` are convolutions whose filters no batch norm reads: never scored, but a plan may name them.
    """

    pairs: tuple[ConvBN, ...]
    unpaired: dict[str, str]
    bare: tuple[ConvBN, ...] = ()

    @property
    def filters(self) -> int:
        """Number of paired filters."""
        return int(sum(pair.paired.sum() for pair in self.pairs))


def find_pairs(model: nn.Module, flow: ChannelFlow) -> Pairing:
    """Pair convolutions with batch norms.

    Args:
        model: The recorded network.
        flow: Its channels.

    Returns:
        The pairs; convolutions without a batch norm are listed with the reason.
    """
    runs: dict[str, list[tuple[Ints, Ints]]] = {}
    unpaired: dict[str, str] = {}
    for conv in flow.convolutions:
        weight = conv.node.args[1]
        name = getattr(weight, "target", None) if getattr(weight, "op", "") == "get_attr" else None
        module_name = str(name).rpartition(".")[0] if name else conv.node.meta["module"]
        if name is None or not isinstance(model.get_submodule(module_name), _ConvNd):
            unpaired[module_name] = "its weights are computed on the way, not stored as filters"
            continue
        runs.setdefault(module_name, []).append((conv.slots, conv.values))
    pairs: list[ConvBN] = []
    bare: list[ConvBN] = []
    readers_of = _readers(flow, [(name, values) for name, seen in runs.items() for _, values in seen])
    for module_name, seen in runs.items():
        values = np.stack([v for _, v in seen])  # (runs, out)
        readers = readers_of.get(module_name, [])
        paired = np.zeros(values.shape[1], bool)
        for reader in readers:
            paired[reader.filters] = True
        if not readers:
            unpaired[module_name] = "no batch norm reads its filters directly"
        module = model.get_submodule(module_name)
        assert isinstance(module, _ConvNd)
        rows = not module.transposed or module.weight.shape[1] == 1
        found = ConvBN(module_name, values.shape[1], seen[0][0], values, tuple(readers), paired, rows)
        if readers:
            pairs.append(found)
        elif rows:
            bare.append(found)
    return Pairing(tuple(pairs), unpaired, tuple(bare))


def _readers(flow: ChannelFlow, runs: list[tuple[str, Ints]]) -> dict[str, list[Reader]]:
    """Batch norms that read each convolution, in execution order: by the owner of every value they are given."""
    owner = np.full(flow.channels.values, -1)
    for index, (_, values) in enumerate(runs):
        owner[values] = index
    found: dict[str, list[Reader]] = {}
    for norm in flow.norms:
        if norm.weight is None or norm.mean is None or norm.variance is None:
            continue
        given = owner[norm.inputs]
        for index in np.unique(given[given >= 0]).tolist():
            name, values = runs[index]
            channels = np.flatnonzero(given == index)
            reader = Reader(norm, norm.inputs[channels] - values[0], channels, _activation(norm.node))  # ids rise by 1
            found.setdefault(name, []).append(reader)
    return found


def _activation(node: fx.Node) -> tuple[str, tuple[Any, ...]] | None:
    """The activation applied to a batch norm's output (its first result), through moves of the same tensor."""
    output = next((user for user in node.users if user.target is operator.getitem and user.args[1] == 0), node)
    for user in output.users:
        name = op_name(user.target)
        if name in ACTIVATIONS:
            return name, tuple(user.args[1:])
    return None
