"""``bshub export``: a model by reference → one checked ONNX file, on request int8 or with its preprocessing inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from bshub.errors import ExportError, OutputError, UsageError, printable
from bshub.files import output_file, sha256
from bshub.inputs import Inputs, load_inputs
from bshub.intake.folders import ClassFolder
from bshub.intake.models import LoadedModel
from bshub.progress import Progress, Steps
from bshub.release.card import shown_reference
from bshub.release.even import evened
from bshub.release.onnx import export_onnx, open_session, set_metadata
from bshub.release.onnx_image import BOUND, compare_pictures, prepend_preprocessing
from bshub.release.onnx_metadata import onnx_metadata
from bshub.release.quantize import CALIBRATION_IMAGES, WEIGHT_BITS, Quantization, judge, quantize_onnx
from bshub.settings import Settings

PARITY_IMAGES = 16
BATCH = 32
_OTHERWISE = "the artifact itself runs without ONNX: bshub.load(FOLDER).module"


@dataclass(frozen=True)
class ExportWishes:
    """What kind of file.

    Attributes:
        opset: Of the file; the exporter's own choice by default.
        int8: Quantise, judged on labelled images.
        preprocessing: Put resizing and normalisation into the graph.
        budget: Points of accuracy that int8 may cost.
    """

    opset: int | None = None
    int8: bool = False
    preprocessing: bool = False
    budget: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 0 <= self.budget <= 100:  # refuses NaN as well
            raise UsageError(
                f"budget is accuracy in points, 0 to 100, not {self.budget!r}",
                hint="correct it on the command line or in the file of settings",
            )


def export_reference(
    inputs: Inputs,
    output: Path,
    wishes: ExportWishes | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a model.

    Args:
        inputs: The model: an artifact or any other. Its clean images are what the file is compared on (without
            them: noise) and what calibrates int8; its test images are what judges int8, else the clean ones do.
        output: The ``.onnx`` file; appears whole or not at all.
        wishes: What kind of file; float32 by default.
        overwrite: Replace an existing file.
        progress: Shows the steps.

    Returns:
        The report.

    Raises:
        UsageError: Wishes that exclude each other, or int8 without clean images.
        OutputError: The file exists or cannot be written.
        ExportError: The file does not compute what the model computes, or int8 costs too much; none is left.
        BshubError: Another of its kinds.
    """
    wishes, steps = wishes or ExportWishes(), Steps(progress)
    _check_place(output, overwrite)
    if wishes.int8 and inputs.clean_dir is None:
        raise UsageError("int8 is calibrated on clean images", hint="add --clean-dir DIR")
    source, clean, test, _ = load_inputs(inputs, Settings(device="cpu"), steps)
    pictures, images = _images(source, clean)
    report: dict[str, Any] = {
        "model": {
            "reference": printable(source.origin.reference),
            "architecture": f"{source.origin.architecture.library}/{source.origin.architecture.name}",
        },
        "images": {"n": min(len(images), PARITY_IMAGES // 2), "kind": "clean images" if clean else "noise"},
    }
    made: dict[str, Any] = {"reference": printable(shown_reference(source.origin.reference))}
    try:
        with output_file(output) as place:
            _make(source, place, wishes, made, pictures, images, clean, test, report, steps)
    except ExportError as error:
        hint = _OTHERWISE if error.hint == "--no-onnx leaves it out" else error.hint
        raise ExportError(error.message, hint=hint) from None
    report["file"] = {"path": str(output), "bytes": output.stat().st_size, "sha256": sha256(output)}
    return {**report, "seconds": steps.seconds}


def _make(
    source: LoadedModel,
    path: Path,
    wishes: ExportWishes,
    made: dict[str, Any],
    pictures: Sequence[Tensor],
    images: Tensor,
    clean: ClassFolder | None,
    test: ClassFolder | None,
    report: dict[str, Any],
    steps: Steps,
) -> None:
    sample = images[:PARITY_IMAGES]
    with steps.step("onnx"):
        even = evened(source, source.module, source.origin.recipe, sample)
        parity = export_onnx(even.model, sample, path, onnx_metadata(source, made), opset=wishes.opset)
        report["parity"] = {**parity.as_dict(), **even.facts()}
    if wishes.int8:
        assert clean is not None
        with steps.step("int8"):
            result = _quantize(source, path, images, clean, test, wishes.budget)
        report["int8"] = made["int8"] = result.as_dict()
    metadata = onnx_metadata(source, made, raw=wishes.preprocessing)
    if wishes.preprocessing:
        with steps.step("graph"):
            session = open_session(path)
            wanted = np.concatenate([session.run(None, {"images": image[None].numpy()})[0] for image in sample])
            prepend_preprocessing(path, source.preprocessing.config, metadata)
            error, same = compare_pictures(path, pictures[:PARITY_IMAGES], wanted)
        report["preprocessing"] = {"error": error, "bound": BOUND, "same_answers": same}
        # an int8 net amplifies one grey level by a whole step of its scale: there the answers alone must agree
        if not same or (error > BOUND and not wishes.int8):
            raise ExportError(
                f"with preprocessing in the graph the logits differ by {error:.2g} (at most {BOUND:g})",
                hint="leave out --with-preprocessing",
            )
    elif wishes.int8:
        proto = onnx.load(str(path))
        set_metadata(proto, metadata)
        path.write_bytes(proto.SerializeToString())


def _quantize(
    source: LoadedModel, path: Path, images: Tensor, clean: ClassFolder, test: ClassFolder | None, budget: float
) -> Quantization:
    """Quantise the file in place and judge it; the float file is the other side."""
    before, whole = open_session(path), path.read_bytes()
    results = []
    for bits in WEIGHT_BITS:
        path.write_bytes(whole)
        quantize_onnx(path, images, bits)
        batches = (test or clean).batches(source.preprocessing, BATCH)
        results.append(judge(before, open_session(path), batches, budget, len(images), bits))
        if results[-1].holds:
            return results[-1]
    best = max(results, key=lambda result: result.after.value)
    raise ExportError(
        f"int8 costs too much: accuracy {best.before} becomes {best.after} on the "
        f"{'test' if test else 'clean'} images, more than the {budget:g} points allowed",
        hint="use the float file, or raise --budget",
    )


def _images(source: LoadedModel, clean: ClassFolder | None) -> tuple[list[Tensor], Tensor]:
    """Pictures uint8 ``(3, h, w)`` and the same normalised ``[n, c, h, w]``; noise where there are none."""
    if clean is None:
        generator, pictures = torch.Generator().manual_seed(0), []
        for number in range(PARITY_IMAGES):
            height, width = (side + 7 * (number % 3) for side in source.preprocessing.input_size[1:])
            pictures.append(torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8))
    else:
        pictures, order = [], np.random.default_rng(0).permutation(len(clean))[:CALIBRATION_IMAGES]
        chosen = ClassFolder(
            clean.root,
            tuple(clean.paths[index] for index in order),
            tuple(clean.labels[index] for index in order),
            clean.matched,
        )
        pictures = [picture for picture, _ in chosen.read()]
    return pictures, torch.stack([source.preprocessing(picture) for picture in pictures])


def _check_place(output: Path, overwrite: bool) -> None:
    if output.suffix != ".onnx":
        raise UsageError(f"{output} does not end in .onnx", hint="name the file: bshub export MODEL out.onnx")
    if output.is_dir() or not output.parent.is_dir():
        raise OutputError(f"{output} cannot be written", hint="choose a file in an existing folder")
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists", hint="choose another name, or add --overwrite")
