"""Model → ONNX file that was checked, and compared with torch on real images; or no file."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bshub.errors import ExportError
from bshub.graph.trace import in_mode
from bshub.release.onnx_check import check_onnx

BOUND = 1e-4  # of the largest logit: an absolute bound would fail a healthy net with large logits


@dataclass(frozen=True)
class Parity:
    """ONNX runtime against torch.

    Attributes:
        error: ``max |Δ| / max |logit|`` over all compared batches.
        bound: Largest error that passes.
        same_answers: Whether every image got the same class.
        batch_sizes: Sizes compared.
        opset: Of the file.
    """

    error: float
    bound: float
    same_answers: bool
    batch_sizes: tuple[int, ...]
    opset: int

    @property
    def holds(self) -> bool:
        """Whether the file computes what the model computes."""
        return self.error <= self.bound and self.same_answers

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return {**asdict(self), "holds": self.holds}


def export_onnx(
    model: nn.Module,
    images: Tensor,
    path: Path,
    metadata: dict[str, Any] | None = None,
    *,
    opset: int | None = None,
) -> Parity:
    """Write, check and compare an ONNX file with a dynamic batch axis.

    Args:
        model: A classifier on the CPU.
        images: Real normalised images ``[n, c, h, w]``, at least one.
        path: Where the file goes.
        metadata: JSON-able values embedded as ``metadata_props``.
        opset: Of the file; the exporter's own choice by default.

    Returns:
        The parity, which holds.

    Raises:
        ExportError: The exporter, the checker or the comparison failed; no file is left.
    """
    try:
        _export(model, images, path, metadata or {}, opset)
        parity = compare_onnx(model, images, path)
        if not parity.holds:
            answers = "the same" if parity.same_answers else "other"
            raise ExportError(
                f"the ONNX file differs from the model: relative error {parity.error:.2g} "
                f"(at most {parity.bound:g}), {answers} answers",
                hint="--no-onnx leaves it out",
            )
        return parity
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _export(model: nn.Module, images: Tensor, path: Path, metadata: dict[str, Any], opset: int | None) -> None:
    import onnx

    example = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)
    try:
        # the exporter reports its progress on stdout, which belongs to results
        with in_mode(model, False), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (example,),
                str(path),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                dynamo=True,
                optimize=True,
                external_data=False,
                opset_version=opset,
                verbose=False,
            )
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(
            f"the ONNX exporter failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="--no-onnx leaves it out",
        ) from error
    _strip_paths(proto)
    if opset is not None and opset_of(proto) != opset:
        raise ExportError(
            f"the network cannot be written with opset {opset}; the exporter made {opset_of(proto)}",
            hint=f"--opset {opset_of(proto)}",
        )
    set_metadata(proto, metadata)
    path.write_bytes(proto.SerializeToString())
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"the ONNX checker refuses the file: {error}", hint="--no-onnx leaves it out") from None


def compare_onnx(model: nn.Module, images: Tensor, path: Path, batch_sizes: Sequence[int] = (1, 8)) -> Parity:
    """Run the file and the model on the same images, at two batch sizes."""
    session = open_session(path)
    worst, same, sizes = 0.0, True, []
    with torch.no_grad(), in_mode(model, False):
        for size in batch_sizes:
            batch = images[:size] if len(images) >= size else images.repeat(-(-size // len(images)), 1, 1, 1)[:size]
            ours = model(batch).numpy()
            (theirs,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
            scale = max(float(np.abs(ours).max()), float(np.finfo(np.float32).tiny))
            worst = (
                max(worst, float(np.abs(ours - theirs).max()) / scale) if ours.shape == theirs.shape else float("inf")
            )
            same = same and ours.shape == theirs.shape and bool((ours.argmax(1) == theirs.argmax(1)).all())
            sizes.append(size)
    import onnx

    return Parity(worst, BOUND, same, tuple(sizes), opset_of(onnx.load(str(path), load_external_data=False)))


def set_metadata(proto: Any, metadata: dict[str, Any]) -> None:
    """Replace a file's ``metadata_props``; what is not text becomes JSON."""
    del proto.metadata_props[:]
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def opset_of(proto: Any) -> int:
    """Version of ONNX's own operators in a file."""
    return next(item.version for item in proto.opset_import if not item.domain)


def open_session(path: Path) -> Any:
    """An onnxruntime session on the CPU, quiet, of a file that the checker passes.

    Raises:
        ExportError: It does not.
    """
    import onnxruntime

    check_onnx(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _strip_paths(proto: Any) -> None:
    """The exporter writes source paths of this machine into every node's metadata: they go."""

    def clean(graph: Any) -> None:
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    clean(attribute.g)
        for value in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
            del value.metadata_props[:]
            value.doc_string = ""
        del graph.metadata_props[:]
        graph.doc_string = ""

    clean(proto.graph)
    for function in proto.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]
            node.doc_string = ""


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence the exporter's and the optimiser's loggers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
