"""Multiply-accumulates of one image, counted on the recorded graph."""

from __future__ import annotations

import math
from typing import Any

from bshub.graph.coupling import op_name
from bshub.graph.trace import Recording


def count_macs(recording: Recording) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image.

    A convolution costs ``out · h · w · (in/groups) · kh · kw``, a product of ``(m, k)`` and ``(k, n)`` ``m·k·n``;
    normalisation, activations and additions are not counted, as is usual.
    """
    total = 0
    images = next(node.meta["shape"][0] for node in recording.graph.nodes if node.op == "placeholder")
    for node in recording.graph.nodes:
        if node.op != "call_function":
            continue
        name = op_name(node.target)
        shape = node.meta.get("shape", ())
        if name == "convolution":
            weight = _shape(node.args[1])
            transposed = node.args[6]
            # transposed: every input position meets (out/groups · kernel) weights
            positions = math.prod(_shape(node.args[0])) if transposed else math.prod(shape)
            total += positions * math.prod(weight[1:])
        elif name in ("mm", "bmm"):
            total += math.prod(shape) * _shape(node.args[0])[-1]
        elif name == "addmm":
            total += math.prod(shape) * _shape(node.args[1])[-1]
        elif name == "linear":
            total += math.prod(shape) * _shape(node.args[0])[-1]
    return total // images


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["shape"])
