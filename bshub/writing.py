"""A finished run → the files of its artifact, the report with every digest last."""

from __future__ import annotations

import platform
import shlex
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import bshub
from bshub.errors import printable
from bshub.inputs import Inputs
from bshub.intake.datasets import is_dataset
from bshub.intake.models import LoadedModel
from bshub.pipeline import SanitizeResult
from bshub.progress import Steps
from bshub.release.artifact import WEIGHTS, file_digests, write_json, write_model, write_report
from bshub.release.bom import BOM, bill_of_materials
from bshub.release.card import Extras, Plot, model_card, shown_reference
from bshub.release.dense import FOLDER, check_dense, dense_copy, write_dense
from bshub.release.even import evened
from bshub.release.evidence import Evidence, gather
from bshub.release.onnx import export_onnx
from bshub.release.onnx_metadata import onnx_metadata
from bshub.release.signature import check_key, sign_receipt
from bshub.settings import Settings

PROOF_IMAGES = 16
_METRICS = ("evaluation", "clean_images", "parameters", "macs", "bytes", "counts", "onnx")
_LIBRARIES = ("torch", "torchvision", "timm", "onnx", "onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True)
class Wishes:
    """What the artifact shall hold beside weights, config, card and numbers.

    Attributes:
        onnx: ``model.onnx``.
        dense: ``dense/``, the copy at the original shapes.
        page: ``report.html`` and ``plots/``.
        pictures: Whether the page shows clean images; None: unless the artifact is published at once.
        repository: Where it will be published, if that is known.
        key: Private key that signs the receipt.
    """

    onnx: bool = True
    dense: bool = False
    page: bool = True
    pictures: bool | None = None
    repository: str | None = None
    key: Path | None = None

    @property
    def with_pictures(self) -> bool:
        """Whether the page shows clean images."""
        return self.pictures if self.pictures is not None else self.repository is None

    def check(self, source: LoadedModel) -> None:
        """Refuse what cannot be had before any work is done."""
        if self.key is not None:
            check_key(self.key)
        if self.dense:
            check_dense(source)


def write_artifact(
    folder: Path,
    source: LoadedModel,
    result: SanitizeResult,
    report: dict[str, Any],
    inputs: Inputs,
    wishes: Wishes,
    steps: Steps,
) -> None:
    """Write everything.

    Args:
        folder: Exists and is empty.
        source: The model before.
        result: Of the run.
        report: Of the run; what is learned here is added to it.
        inputs: As typed, for the command line in the card.
        wishes: What to write.
        steps: Where the work is shown.
    """
    recipe = source.origin.recipe.then(result.removal.attributes, result.plan.kept, result.plan.refilled)
    images = result.clean.images[:PROOF_IMAGES].cpu()
    with steps.step("write"):
        write_model(folder, result.model, source, recipe)
    before = sum(tensor.numel() * tensor.element_size() for tensor in source.module.state_dict().values())
    report["bytes"] = {"before": before, "after": (folder / WEIGHTS).stat().st_size}
    report["versions"] = _versions(source)
    if wishes.onnx:
        made = {"counts": report["counts"], "score": report["diagnosis"]["score"]}
        with steps.step("onnx"):
            even = evened(source, result.model, recipe, images)
            parity = export_onnx(even.model, images, folder / "model.onnx", onnx_metadata(source, made))
        report["onnx"] = {**parity.as_dict(), **even.facts(), "bytes": (folder / "model.onnx").stat().st_size}
    if wishes.dense:
        with steps.step("dense"):
            dense, proof = dense_copy(source, result.model, recipe, images)
            write_dense(folder / FOLDER, source, dense, proof, folder / WEIGHTS)
        report["dense"] = proof.as_dict()
    command = _command(inputs, report["settings"], wishes)
    plots = _write_page(folder, source, result, report, command, wishes, steps) if wishes.page else []
    extras = Extras(plots, wishes.dense, "page" in report, wishes.repository)
    card = model_card(source, result.model, recipe, report, command, extras)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_json(folder / "metrics.json", {key: report[key] for key in _METRICS if key in report})
    public = {**report["model"], "reference": shown_reference(source.origin.reference)}
    record, created = {**report, "model": public, "command": command}, datetime.now(UTC)
    write_json(folder / BOM, bill_of_materials(source, record, file_digests(folder), created))
    write_report(folder, record, created)
    if wishes.key is not None:
        sign_receipt(folder, wishes.key)


def _write_page(
    folder: Path,
    source: LoadedModel,
    result: SanitizeResult,
    report: dict[str, Any],
    command: str,
    wishes: Wishes,
    steps: Steps,
) -> list[Plot]:
    from bshub.release.report import report_page, write_plots

    names = [printable(name, 80) for name in source.labels or ()]
    names = names or [f"class {index}" for index in range(source.origin.num_classes)]
    with steps.step("report"):
        evidence = _evidence(source, result, report, names, wishes.with_pictures)
        try:
            page = report_page(evidence, report, names, command)
            plots = write_plots(folder, evidence, report)
        except Exception as error:  # of the drawing library: a page must not cost a finished run
            shutil.rmtree(folder / "plots", ignore_errors=True)
            report["warnings"].append(f"report.html could not be drawn: {printable(error, 160)}")
            return []
    (folder / "report.html").write_text(page, encoding="utf-8")
    report["page"] = {"clean_images_shown": sum(len(filter.images) for filter in evidence.excited)}
    return plots


def _evidence(
    source: LoadedModel, result: SanitizeResult, report: dict[str, Any], names: list[str], pictures: bool
) -> Evidence:
    """Where the clean images are; both networks go back to the CPU."""
    device, diagnosis = result.clean.images.device, result.diagnosis
    try:
        return gather(
            source.module.to(device),
            result.model.to(device),
            diagnosis.pairing,
            diagnosis.scores,
            diagnosis.threshold,
            result.plan,
            result.clean,
            source.preprocessing,
            names,
            batch_size=report["settings"]["batch_size"],
            pictures=pictures,
        )
    finally:
        source.module.cpu()
        result.model.cpu()


def _versions(source: LoadedModel) -> dict[str, str]:
    found = {"bshub": bshub.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _command(inputs: Inputs, settings: dict[str, Any], wishes: Wishes) -> str:
    """The command line that makes the same artifact again: what differs from the defaults, paths left open."""
    images = str(inputs.clean_dir) if is_dataset(inputs.clean_dir) else "CLEAN_IMAGES"
    parts = ["bshub", "sanitize", shown_reference(inputs.model)]
    parts += ["--clean-dir", images] if inputs.clean_dir else []
    parts += ["--unlabelled"] if inputs.unlabelled else []
    parts += ["--test-dir", "HELD_OUT_IMAGES"] if inputs.test_dir else []
    parts += ["--trigger", "TRIGGER"] if inputs.trigger else []
    parts += ["--classes", "CLASS_NAMES"] if inputs.classes else []
    parts += ["--arch", inputs.arch] if inputs.arch else []
    parts += ["--num-classes", str(inputs.num_classes)] if inputs.num_classes else []
    for name, default in Settings().as_dict().items():
        if settings[name] != default and name != "device":
            parts += [f"--{name.replace('_', '-')}", str(settings[name])]
    parts += ["--no-onnx"] * (not wishes.onnx) + ["--dense"] * wishes.dense + ["--no-report"] * (not wishes.page)
    return shlex.join(parts)
