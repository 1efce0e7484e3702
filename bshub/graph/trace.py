"""Record what a network computes: ``nn.Module`` → ``torch.fx.Graph`` of ATen operations.

The model's own Python runs once on *meta* tensors (shapes without storage) under a dispatch mode that
writes down every ATen operation. Shapes are concrete, so control flow just happens; nothing is computed,
so a ResNet-50 takes about 0.1 s; and whatever Python built the network (functional batch norm, weight
transforms, custom modules) ends in the same few dozen operations.

Every parameter and buffer enters the graph as a ``get_attr`` node that carries its qualified name: the
way from an operation back to the module's weights is exact. ``node.meta`` holds ``shape`` (or a tuple of
shapes) and ``module``, the qualified name of the module that was running.

A model that mixes in tensors which are not registered cannot run on meta tensors; it is recorded on real
ones instead, slower and with the same result.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from bshub.errors import TraceError
from bshub.graph.shapes import shape_of

# Operations that give Python a number or a truth value of a tensor.
READS_VALUES = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


def overwritten(before: Tensor, after: Tensor) -> Tensor:
    """Stand-in node: ``before`` shares memory with ``after``, which was written in place.

    Args:
        before: The older tensor.
        after: The one that was written.

    Returns:
        What ``before`` holds now.
    """
    return before


@dataclass(frozen=True)
class Recording:
    """One recorded run.

    Attributes:
        graph: The operations in execution order; ``get_attr`` targets are parameter and buffer names.
        training: Whether the model was in training mode.
        inputs: Qualified module name → the nodes of the tensors it was given.
        outputs: Qualified module name → the nodes of the tensors it gave back.
    """

    graph: fx.Graph
    training: bool
    inputs: dict[str, list[fx.Node]] = field(repr=False)
    outputs: dict[str, list[fx.Node]] = field(repr=False)

    def parameters_used(self) -> set[str]:
        """Names of the parameters and buffers that some operation read."""
        return {node.target for node in self.graph.nodes if node.op == "get_attr" and node.users}  # type: ignore[misc]


class _Recorder(TorchDispatchMode):
    """Turns dispatched operations into graph nodes; tensors are told apart by identity and kept alive."""

    def __init__(self, named: dict[str, Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.scope: list[str] = [""]
        self._nodes: dict[int, tuple[fx.Node, int | None]] = {}
        self._alive: list[Tensor] = []
        self._sharing: dict[int, list[Tensor]] = {}  # storage → tensors that view it
        for name, tensor in named.items():
            node = self.graph.create_node("get_attr", name)
            self._bind(tensor, node, None)

    def input(self, tensor: Tensor) -> None:
        node = self.graph.placeholder("images")
        self._bind(tensor, node, None)

    def node_of(self, tensor: Tensor) -> fx.Node:
        found = self._nodes.get(id(tensor))
        if found is None:  # a tensor made outside the recorded operations: a constant of the code
            node = self.graph.create_node("get_attr", f"<constant {len(self._alive)}>")
            self._bind(tensor, node, None)
            return node
        node, index = found
        if index is None:
            return node
        item = self.graph.call_function(operator.getitem, (node, index))
        item.meta.update(shape=tuple(tensor.shape), module=node.meta["module"])
        self._nodes[id(tensor)] = (item, None)
        return item

    def _bind(self, tensor: Tensor, node: fx.Node, index: int | None) -> None:
        if index is None:
            node.meta.setdefault("shape", tuple(tensor.shape))
            node.meta.setdefault("module", self.scope[-1])
        if id(tensor) not in self._nodes:
            self._alive.append(tensor)
            self._sharing.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        self._nodes[id(tensor)] = (node, index)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, (list, tuple)):
            return type(value)([self._argument(v) for v in value])
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS_VALUES:
            self._refuse_decision(args)
        result = shape_of(func, args) if not kwargs else None
        if result is None:
            result = func(*args, **kwargs)
        given = self._argument(args), {key: self._argument(value) for key, value in kwargs.items()}
        node = self.graph.call_function(func)
        node.args, node.kwargs = given  # set afterwards: creating a node walks its arguments in Python
        node.meta["module"] = self.scope[-1]
        if isinstance(result, Tensor):
            self._bind(result, node, None)
            node.meta["shape"] = tuple(result.shape)
            if func._schema.is_mutable:
                self._mark_overwritten(result, node)
        elif isinstance(result, (list, tuple)):
            node.meta["shape"] = tuple(tuple(t.shape) if isinstance(t, Tensor) else () for t in result)
            for index, item in enumerate(result):
                if isinstance(item, Tensor):
                    self._bind(item, node, index)
        return result

    def _refuse_decision(self, args: Any) -> None:
        """A number that Python reads from the images may choose a branch, and the other one would go unseen."""
        ahead = [node for node in (self.node_of(arg) for arg in args if isinstance(arg, Tensor))]
        seen: set[fx.Node] = set()
        while ahead:
            node = ahead.pop()
            if node.op == "placeholder":
                where, module = _calling_line(), self.scope[-1]
                raise TraceError(
                    f"the model's code decides by the values of its images, in module {module!r} ({where}): "
                    "one run does not show all that it computes",
                    hint="write the decision with tensors (torch.where), or give a model without it",
                    module=module,
                )
            if node not in seen:
                seen.add(node)
                ahead += node.all_input_nodes

    def _mark_overwritten(self, written: Tensor, node: fx.Node) -> None:
        for other in self._sharing.get(written.untyped_storage()._cdata, ()):
            if other is written:
                continue
            stale = self.graph.call_function(overwritten, (self.node_of(other), node))
            stale.meta.update(shape=tuple(other.shape), module=self.scope[-1])
            self._nodes[id(other)] = (stale, None)


def _calling_line() -> str:
    """The innermost line of the model's own code, ``net.py, line 12``."""
    own = (str(Path(torch.__file__).parent), __file__)
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"


@contextmanager
def _following_modules(
    model: nn.Module, recorder: _Recorder, inputs: dict[str, list[fx.Node]], outputs: dict[str, list[fx.Node]]
) -> Iterator[None]:
    names = {id(module): name for name, module in model.named_modules()}

    def note(where: dict[str, list[fx.Node]], name: str, value: Any) -> None:
        where.setdefault(name, []).extend(recorder.node_of(tensor) for tensor in _tensors(value))

    def enter(module: nn.Module, args: Any) -> None:
        name = names.get(id(module), recorder.scope[-1])
        recorder.scope.append(name)
        note(inputs, name, args)

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        note(outputs, recorder.scope.pop(), result)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module in training or evaluation mode; restore each module's own flag afterwards.

    Args:
        model: The network.
        training: True: training mode.

    Returns:
        A context; nothing is yielded.
    """
    before = [(module, module.training) for module in model.modules()]
    if any(flag != training for _, flag in before):
        model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            if module.training != flag:
                module.training = flag


def record(model: nn.Module, input_size: tuple[int, int, int], *, training: bool = False) -> Recording:
    """Record one forward run.

    Args:
        model: The network; it is left exactly as it was.
        input_size: ``(channels, height, width)`` of one image.
        training: Record the training-mode run, which may have branches of its own.

    Returns:
        The recording.

    Raises:
        TraceError: The forward run itself fails; the message names the module.
    """
    try:
        return _record(model, input_size, training, torch.device("meta"))
    except TraceError as first:
        try:
            return _record(model, input_size, training, torch.device("cpu"))
        except TraceError:
            raise first from None


def _record(model: nn.Module, input_size: tuple[int, int, int], training: bool, device: torch.device) -> Recording:
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    if device.type == "meta":
        named = {name: torch.empty_like(tensor, device=device) for name, tensor in named.items()}
    else:
        named = {name: tensor.detach().to(device, copy=True) for name, tensor in named.items()}
    images = torch.zeros(2, *input_size, device=device)  # two images: training-mode BN refuses one
    recorder = _Recorder(named)
    recorder.input(images)
    inputs: dict[str, list[fx.Node]] = {}
    outputs: dict[str, list[fx.Node]] = {}
    with in_mode(model, training), torch.no_grad(), _following_modules(model, recorder, inputs, outputs):
        state = torch.get_rng_state()
        try:
            with recorder:
                result = torch.func.functional_call(model, named, (images,))
        except TraceError:
            raise
        except Exception as error:
            where = recorder.scope[-1] or type(model).__name__
            raise TraceError(
                f"the model's forward run fails at input size {tuple(input_size)}, in module {where!r}: {error}",
                hint="check the input size and that the model takes one image tensor",
                module=recorder.scope[-1],
            ) from error
        finally:
            torch.set_rng_state(state)
    recorder.graph.output(recorder._argument(_tensors(result)))
    return Recording(recorder.graph, training, inputs, outputs)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    """All tensors in a model's answer: a tensor, or (named) tuples, lists and dicts of them."""
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, dict):
        result = tuple(result.values())
    if isinstance(result, (list, tuple)):
        return tuple(tensor for item in result for tensor in _tensors(item))
    return ()
