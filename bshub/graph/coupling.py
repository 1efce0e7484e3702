"""Follow the channels through recorded runs: ``Recording`` → :class:`ChannelFlow`."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from bshub.errors import TraceError
from bshub.graph.call import Call, Result
from bshub.graph.channels import Channels, Ints, Lane, Traveller
from bshub.graph.pause import collector_paused
from bshub.graph.rules import OP_RULES
from bshub.graph.rules_elementwise import refuse
from bshub.graph.trace import Recording, overwritten, record

BATCH_NORMS = {name for name, rule in OP_RULES.items() if rule is OP_RULES["native_batch_norm"]}


@dataclass(frozen=True)
class Produced:
    """A convolution seen in the graph: the variables and values of its filters, ``[out]`` each."""

    node: fx.Node
    slots: Ints
    values: Ints


@dataclass(frozen=True)
class Normalised:
    """A batch norm seen in the graph: its input's values, its output's values and its parameters' names."""

    node: fx.Node
    inputs: Ints
    outputs: Ints
    weight: str | None
    bias: str | None
    mean: str | None
    variance: str | None
    eps: float


@dataclass(frozen=True)
class ChannelFlow:
    """What leaves together, what stays and why.

    Attributes:
        channels: The bookkeeping of all rules.
        groups: Coupling group of each variable, ``[variables]``.
        pinned: Group → reason.
        convolutions: Every convolution run, in execution order.
        norms: Every batch norm run, in execution order.
        widths_in: Module → variables of each channel axis of its inputs.
        widths_out: Module → variables of each channel axis of its outputs.
        widths_inside: Module → variables of each channel axis that its own operations make.
        unseen: Parameters that no recorded run reads: they keep their shapes whatever leaves.
    """

    channels: Channels
    groups: Ints
    pinned: dict[int, str]
    convolutions: list[Produced]
    norms: list[Normalised]
    widths_in: dict[str, list[Ints]]
    widths_out: dict[str, list[Ints]]
    widths_inside: dict[str, list[Ints]]
    unseen: tuple[str, ...] = ()


@collector_paused()
def follow_channels(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[ChannelFlow, Recording]:
    """Record the model and follow its channels.

    The evaluation run is always recorded. Where it leaves a parameter unused (auxiliary heads), the training
    run is recorded too and both are solved together.

    Args:
        model: The network, not changed.
        input_size: ``(channels, height, width)``.

    Returns:
        The flow, and the recording of the evaluation run.

    Raises:
        TraceError: The model's forward run fails.
    """
    evaluation = record(model, input_size)
    recordings = [evaluation]
    unseen = {name for name, _ in model.named_parameters()} - evaluation.parameters_used()
    if unseen:
        try:
            recordings.append(record(model, input_size, training=True))
            unseen -= recordings[-1].parameters_used()
        except TraceError:  # it wants targets, or more images: the evaluation run is what the proof is about
            pass
    return dataclasses.replace(solve(recordings), unseen=tuple(sorted(unseen))), evaluation


def solve(recordings: Sequence[Recording]) -> ChannelFlow:
    """Apply the rules to recorded runs of one model.

    Args:
        recordings: Runs in evaluation mode, and in training mode where it differs.

    Returns:
        Channels and coupling groups.
    """
    channels = Channels()
    convolutions: list[Produced] = []
    norms: list[Normalised] = []
    widths_in: dict[str, list[Ints]] = {}
    widths_out: dict[str, list[Ints]] = {}
    widths_inside: dict[str, list[Ints]] = {}
    for recording in recordings:
        travellers = _walk(recording, channels, convolutions, norms)
        made: dict[str, list[fx.Node]] = {}
        for node in recording.graph.nodes:
            if node.op == "call_function" and node.target is not overwritten:
                made.setdefault(node.meta["module"], []).append(node)
        for nodes_of, widths in (
            (recording.inputs, widths_in),
            (recording.outputs, widths_out),
            (made, widths_inside),
        ):
            _note_widths(nodes_of, travellers, widths)
    groups = channels.groups()
    return ChannelFlow(
        channels, groups, channels.pinned(groups), convolutions, norms, widths_in, widths_out, widths_inside
    )


def _note_widths(
    nodes_of: dict[str, list[fx.Node]], travellers: dict[fx.Node, Result], widths: dict[str, list[Ints]]
) -> None:
    for module, nodes in nodes_of.items():
        for node in nodes:
            result = travellers[node]
            for traveller in result if isinstance(result, list) else [result]:
                widths.setdefault(module, []).extend(lane.slots for lane in traveller.lanes if lane is not None)


def _walk(
    recording: Recording, channels: Channels, convolutions: list[Produced], norms: list[Normalised]
) -> dict[fx.Node, Result]:
    seen: dict[fx.Node, Result] = {}

    def value(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return seen[arg]
        if isinstance(arg, (list, tuple)):
            return [value(item) for item in arg]
        return arg

    for node in recording.graph.nodes:
        shape = node.meta.get("shape", ())
        if node.op == "placeholder":
            seen[node] = Traveller.plain(shape)
        elif node.op == "get_attr":
            constant = str(node.target).startswith("<")
            seen[node] = Traveller.plain(shape) if constant else channels.parameter(str(node.target), shape)
        elif node.target is overwritten and not node.users:
            seen[node] = Traveller.plain(shape)  # nobody looks at the old view again
        elif node.op == "output":
            for traveller in (item for arg in value(node.args) for item in (arg if isinstance(arg, list) else [arg])):
                for lane in traveller.lanes:
                    channels.pin(lane, "it is an output of the model")
        elif node.target is operator.getitem:
            source = seen[node.args[0]]
            assert isinstance(source, list)
            seen[node] = source[node.args[1]]
        else:
            name = op_name(node.target)
            args = tuple(value(arg) for arg in node.args)
            kwargs = {key: value(arg) for key, arg in node.kwargs.items()}
            module = node.meta["module"]
            whole = recording.inputs.get(module) == [node.args[0]] and recording.outputs.get(module) == [node]
            call = Call(name, module, args, kwargs, shape, whole)
            seen[node] = OP_RULES.get(name, refuse)(channels, call)
            if name == "convolution":
                _note_convolution(seen[node], node, convolutions)
            elif name in BATCH_NORMS and not recording.training:
                _note_norm(seen[node], node, args, norms)
    return seen


def op_name(target: Any) -> str:
    """ATen name without overload and in-place underscore.

    Args:
        target: The target of a node.

    Returns:
        The key of ``OP_RULES``.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.removeprefix("aten::")
        return name.removesuffix("_") if not name.endswith("__") else name
    return str(getattr(target, "__name__", target))


def _note_convolution(result: Result, node: fx.Node, convolutions: list[Produced]) -> None:
    assert isinstance(result, Traveller)
    lane = result.lanes[1]
    if lane is not None:
        convolutions.append(Produced(node, lane.slots, lane.values))


def _note_norm(result: Result, node: fx.Node, args: tuple[Any, ...], norms: list[Normalised]) -> None:
    output = result[0] if isinstance(result, list) else result
    before: Lane | None = args[0].lanes[1]
    after = output.lanes[1]
    if before is None or after is None:
        return
    names = [str(arg.target) if isinstance(arg, fx.Node) and arg.op == "get_attr" else None for arg in node.args[1:5]]
    eps = next((arg for arg in reversed(node.args) if isinstance(arg, float)), 1e-5)
    weight, bias, mean, variance = names
    norms.append(Normalised(node, before.values, after.values, weight, bias, mean, variance, eps))
