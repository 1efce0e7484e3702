"""A float ONNX file → int8, calibrated on clean images and judged by an accuracy gate.

Static quantisation in QDQ form: signed 8-bit weights, one scale per output channel; 8-bit activations whose ranges
are the smallest and largest values seen on the calibration images. It helps some networks two- to fourfold and ruins
others (EfficientNet), so the file is kept only if it answers nearly as well as the float one. Processors without VNNI
add two products up in 16 bits, which overflows; where that costs too much, seven bits of a weight do not.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bshub.errors import ExportError
from bshub.evaluation.metrics import Rate

CALIBRATION_IMAGES = 256
WEIGHT_BITS = (8, 7)  # tried in this order, until one holds


@dataclass(frozen=True)
class Quantization:
    """Float against int8 on the same images.

    Attributes:
        before: Accuracy of the float file.
        after: Accuracy of the int8 file.
        agreement: Share of images with the same answer.
        budget: Points of accuracy that were allowed to be lost.
        calibrated: Number of calibration images.
        bits: Of a weight.
    """

    before: Rate
    after: Rate
    agreement: Rate
    budget: float
    calibrated: int
    bits: int = 8

    @property
    def holds(self) -> bool:
        """Whether the loss lies within the budget."""
        return 100 * (self.before.value - self.after.value) <= self.budget + 1e-9

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        rates = {name: getattr(self, name).as_dict() for name in ("before", "after", "agreement")}
        return {**asdict(self), **rates, "holds": self.holds}


def quantize_onnx(path: Path, images: Tensor, bits: int = 8) -> None:
    """Quantise a file in place.

    Args:
        path: A float ONNX file with the input ``images``.
        images: Normalised clean images ``[n, c, h, w]``; the first 256 calibrate.
        bits: Of a weight: 8, or 7 for sums that stay within 16 bits everywhere.

    Raises:
        ExportError: onnxruntime cannot quantise it.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Feeds the calibration images one by one."""

        def __init__(self) -> None:
            self._rest = iter(images[:CALIBRATION_IMAGES].split(1))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._rest, None)
            return None if batch is None else {"images": batch.numpy()}

    with tempfile.TemporaryDirectory() as name, _quiet():
        ready, done = Path(name) / "ready.onnx", Path(name) / "done.onnx"
        try:
            quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(ready),
                str(done),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=bits == 7,
            )
        except Exception as error:  # the quantiser raises many kinds
            raise ExportError(
                f"onnxruntime cannot quantise the file: {str(error).splitlines()[0] if str(error) else error!r}",
                hint="leave out --int8",
            ) from error
        path.write_bytes(done.read_bytes())


def judge(
    before: Any, after: Any, batches: Iterable[tuple[Tensor, Tensor]], budget: float, calibrated: int, bits: int = 8
) -> Quantization:
    """Compare two sessions on labelled images.

    Args:
        before: Session of the float file.
        after: Session of the int8 file.
        batches: ``(images [n, c, h, w], labels [n])``.
        budget: Points of accuracy that may be lost.
        calibrated: Number of calibration images, for the record.
        bits: Of a weight, for the record.

    Returns:
        The comparison; it may fail.
    """
    n, right, same = 0, np.zeros(2, np.int64), 0
    for images, labels in batches:
        answers = [session.run(None, {"images": images.numpy()})[0].argmax(1) for session in (before, after)]
        right += [int((answer == labels.numpy()).sum()) for answer in answers]
        same += int((answers[0] == answers[1]).sum())
        n += len(labels)
    return Quantization(Rate(int(right[0]), n), Rate(int(right[1]), n), Rate(same, n), budget, calibrated, bits)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser logs to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
