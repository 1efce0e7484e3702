"""54 to 57: ONNX."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from bad.bench import Bench, Case, Outcome
from bshub.errors import ExportError
from bshub.release.onnx import export_onnx, open_session


def with_weights_at(location: Callable[[Bench], str]) -> Callable[[Bench], Outcome]:
    """A file whose one tensor lies elsewhere; the bytes there are real, so that only the path is wrong."""

    def run(bench: Bench) -> Outcome:
        place = location(bench)
        weight = TensorProto(name="w", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", place), ("offset", "0"), ("length", "16")):
            weight.external_data.add(key=key, value=value)
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("images", "logits")]
        node = helper.make_node("Add", ["images", "w"], ["logits"])
        graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
        path = bench.put("onnx/model.onnx", helper.make_model(graph).SerializeToString())
        return bench.call(open_session, path)

    return run


def secret(bench: Bench) -> Path:
    return bench.put("secret.bin", bytes(16))


def linked(bench: Bench) -> str:
    bench.put("onnx/x", b"")
    (bench.bad / "onnx" / "weights").symlink_to(secret(bench))
    return "weights"


def hard_linked(bench: Bench) -> str:
    bench.put("onnx/x", b"")
    os.link(secret(bench), bench.bad / "onnx" / "weights")
    return "weights"


class TwoFaced(nn.Module):
    """Computes one thing when exported and another when run."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(x.mean((2, 3)))
        return logits if torch.compiler.is_exporting() else logits.flip(1) + 1


def divergence(bench: Bench) -> Outcome:
    outcome = bench.call(export_onnx, TwoFaced().eval(), torch.rand(2, 3, 8, 8), bench.bad / "model.onnx")
    assert list(bench.bad.iterdir()) == []
    return outcome


def escape(bench: Bench) -> str:
    secret(bench)
    return "../secret.bin"


def refused_by_the_checker(bench: Bench) -> Outcome:
    proto = onnx.ModelProto(ir_version=8)
    return bench.call(open_session, bench.put("model.onnx", proto.SerializeToString()))


ELSEWHERE = "keeps tensor 'w' in another file"
CASES = [
    Case(54, "external data at ../", with_weights_at(escape), ExportError, f"{ELSEWHERE}, '../secret.bin'", 1),
    Case(54, "external data at /", with_weights_at(lambda b: str(secret(b))), ExportError, ELSEWHERE, 1),
    Case(54, "external data behind a symlink", with_weights_at(linked), ExportError, ELSEWHERE, 1),
    Case(55, "external data behind a hard link", with_weights_at(hard_linked), ExportError, ELSEWHERE, 1, silent=True),
    Case(
        56, "zero bytes", lambda b: b.call(open_session, b.put("m.onnx", b"")), ExportError, "0 bytes", 1, silent=True
    ),
    Case(56, "a header alone", refused_by_the_checker, ExportError, "the ONNX checker refuses", 1, silent=True),
    Case(57, "divergence", divergence, ExportError, "the ONNX file differs from the model", 1),
]
