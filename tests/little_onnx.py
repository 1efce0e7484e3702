"""A small ONNX file that is sound and is not the one that belongs there."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper


def linear_onnx(path: Path) -> None:
    """A sound ONNX classifier of the demo's shape that is not the demo's model."""
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight"], ["logits"]),
        ],
        "other",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 64, 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [helper.make_tensor("weight", TensorProto.FLOAT, [3, 10], [0.1 * i for i in range(30)])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
