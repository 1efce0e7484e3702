"""One function per command: references and folders in, folders and reports out. Knows nothing of a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bshub.device import pick_device
from bshub.errors import TriggerError, UsageError, printable
from bshub.evaluation.attacks.trigger import Trigger, load_trigger, resize_to
from bshub.evaluation.metrics import Evaluation, der, evaluate_models
from bshub.files import check_output, output_folder
from bshub.intake.folders import ClassFolder, open_folder
from bshub.intake.models import LoadedModel, load_model
from bshub.pipeline import SanitizeResult, sanitize, scan
from bshub.progress import Progress, Steps
from bshub.release.artifact import WEIGHTS, write_json, write_model, write_report
from bshub.release.card import model_card, shown_reference
from bshub.release.onnx import export_onnx
from bshub.repair.finetune import find_repair
from bshub.settings import Settings


@dataclass(frozen=True)
class Inputs:
    """What a command works on, as typed.

    Attributes:
        model: Model reference.
        arch: Architecture of a weights-only file.
        num_classes: Number of outputs, where nothing else states it.
        clean_dir: Class folders of clean images.
        test_dir: Class folders to measure on; never used for choosing.
        trigger: ``trigger.json``, used only to measure.
    """

    model: str
    arch: str | None = None
    num_classes: int | None = None
    clean_dir: Path | None = None
    test_dir: Path | None = None
    trigger: Path | None = None


def sanitize_to_folder(
    inputs: Inputs,
    settings: Settings,
    output: Path | None,
    *,
    overwrite: bool = False,
    onnx: bool = True,
    push_to: str | None = None,
    private: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Sanitize a model by reference and write the artifact.

    Args:
        inputs: Model and images; ``clean_dir`` is needed.
        settings: Of the run.
        output: The artifact's folder; None: nothing is written (a dry run: no repair, no export).
        overwrite: Replace an earlier artifact there.
        onnx: Whether to export ONNX.
        push_to: Hub repository that the artifact is published to.
        private: Whether a new repository is private.
        progress: Shows the steps.

    Returns:
        The report.

    Raises:
        BshubError: One of its kinds; nothing is left behind.
    """
    if inputs.clean_dir is None:
        raise UsageError("sanitize needs clean images", hint="add --clean-dir DIR")
    find_repair(settings.repair)
    if output is not None:
        check_output(output, overwrite)
    steps = Steps(progress)
    source, clean, test, trigger = _load(inputs, steps)
    assert clean is not None
    batches = clean.batches(source.preprocessing, settings.batch_size)
    if output is None:
        diagnosis = scan(source.module, batches, settings, total=len(clean), progress=steps)
        return {"model": _model_facts(source, clean), "diagnosis": diagnosis.as_dict(), "seconds": steps.seconds}
    result = sanitize(source.module, batches, settings, total=len(clean), progress=steps)
    report: dict[str, Any] = {"model": _model_facts(source, clean), **result.report}
    if test is not None:
        before, after = _measure([source.module, result.model], test, source, trigger, settings, steps)
        report["evaluation"] = {
            "before": before.as_dict(),
            "after": after.as_dict(),
            "der": der(before, after),
            "test_images": len(test),
            "unreadable": {printable(path.name): reason for path, reason in test.rejected.items()},
        }
    with output_folder(output, overwrite) as folder:
        _write(folder, source, result, report, inputs, onnx, steps)
    if push_to:
        from bshub.release.publish import publish

        with steps.step("publish"):
            published = publish(output, push_to, private=private)
        report["published"] = {"url": published.url, "commit": published.commit, "unchanged": published.unchanged}
    return report


def scan_reference(inputs: Inputs, settings: Settings, *, progress: Progress | None = None) -> dict[str, Any]:
    """Judge a model by reference and touch nothing.

    Returns:
        The report; ``suspects`` lists the flagged filters with the highest scores.
    """
    steps = Steps(progress)
    source, clean, _, _ = _load(inputs, steps)
    batches = clean.batches(source.preprocessing, settings.batch_size) if clean else None
    diagnosis = scan(
        source.module,
        batches,
        settings,
        input_size=source.preprocessing.input_size,
        total=len(clean) if clean else None,
        progress=steps,
    )
    suspects = [
        {"layer": name, "filter": index, "score": round(score, 3)}
        for name, index, score in diagnosis.most_suspicious(20)
    ]
    return {
        "model": _model_facts(source, clean),
        "diagnosis": diagnosis.as_dict(),
        "suspects": suspects,
        "seconds": steps.seconds,
    }


def evaluate_reference(inputs: Inputs, settings: Settings, *, progress: Progress | None = None) -> dict[str, Any]:
    """Measure a model by reference on a test folder.

    Returns:
        The report.
    """
    if inputs.test_dir is None:
        raise UsageError("evaluate needs images", hint="add --test-dir DIR")
    steps = Steps(progress)
    source, _, test, trigger = _load(inputs, steps)
    assert test is not None
    (rates,) = _measure([source.module], test, source, trigger, settings, steps)
    return {"model": _model_facts(source, test), "evaluation": rates.as_dict(), "seconds": steps.seconds}


def _load(inputs: Inputs, steps: Steps) -> tuple[LoadedModel, ClassFolder | None, ClassFolder | None, Trigger | None]:
    """The model, the clean and the test folder and the trigger, each checked against the others."""
    with steps.step("load"):
        trigger = _trigger(inputs)
        source = load_model(inputs.model, arch=inputs.arch, num_classes=inputs.num_classes)
        _check_target(trigger, source)
        clean = _folder(inputs.clean_dir, source) if inputs.clean_dir else None
        test = _folder(inputs.test_dir, source) if inputs.test_dir else None
        _check_victims(trigger, test)
    return source, clean, test, trigger


def _trigger(inputs: Inputs) -> Trigger | None:
    if inputs.trigger is None:
        return None
    if inputs.test_dir is None:
        raise UsageError("a trigger is only used to measure, on test images", hint="add --test-dir DIR")
    return load_trigger(inputs.trigger)


def _check_target(trigger: Trigger | None, source: LoadedModel) -> None:
    if trigger is not None and trigger.target >= source.origin.num_classes:
        raise TriggerError(
            f"the trigger's target label {trigger.target} does not exist in a model with "
            f"{source.origin.num_classes} classes"
        )


def _check_victims(trigger: Trigger | None, test: ClassFolder | None) -> None:
    if trigger is not None and test is not None and set(test.labels) == {trigger.target}:
        raise UsageError(
            "the test images are all of the trigger's target class: there is nothing to attack",
            hint="give --test-dir images of other classes",
        )


def _folder(path: Path, source: LoadedModel) -> ClassFolder:
    return open_folder(path, source.origin.num_classes, source.labels)


def _measure(
    models: list[nn.Module],
    test: ClassFolder,
    source: LoadedModel,
    trigger: Trigger | None,
    settings: Settings,
    steps: Steps,
) -> list[Evaluation]:
    device = pick_device(settings.device)
    with steps.step("evaluate", len(test)) as advance:
        try:
            for model in models:
                model.to(device)
            target = trigger.target if trigger else None
            batches = _test_batches(test, source, trigger, settings.batch_size)
            return evaluate_models(models, batches, target, progress=advance)
        finally:
            for model in models:
                model.cpu()


def _test_batches(
    test: ClassFolder, source: LoadedModel, trigger: Trigger | None, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Every image decoded once, with and without the trigger, which is stamped before the preprocessing."""
    clean: list[Tensor] = []
    stamped: list[Tensor] = []
    labels: list[int] = []

    def batch() -> tuple[Tensor, Tensor, Tensor | None]:
        return torch.stack(clean), torch.tensor(labels), torch.stack(stamped) if trigger else None

    for image, label in test.read():
        clean.append(source.preprocessing(image))
        labels.append(label)
        if trigger is not None:
            canvas = resize_to(image, trigger.size)
            stamped.append(source.preprocessing(trigger(canvas.unsqueeze(0))[0]))
        if len(clean) == size:
            yield batch()
            clean, stamped, labels = [], [], []
    if clean:
        yield batch()


def _write(
    folder: Path,
    source: LoadedModel,
    result: SanitizeResult,
    report: dict[str, Any],
    inputs: Inputs,
    onnx: bool,
    steps: Steps,
) -> None:
    recipe = source.origin.recipe.then(result.removal.attributes, result.plan.kept, result.plan.refilled)
    with steps.step("write"):
        write_model(folder, result.model, source, recipe)
    before = sum(tensor.numel() * tensor.element_size() for tensor in source.module.state_dict().values())
    report["bytes"] = {"before": before, "after": (folder / WEIGHTS).stat().st_size}
    if onnx:
        metadata = {
            "class_names": list(source.labels or ()),
            "preprocess": source.preprocessing.config,
            "bshub": {"counts": report["counts"], "score": report["diagnosis"]["score"]},
        }
        with steps.step("onnx"):
            parity = export_onnx(result.model, result.clean.images[:16].cpu(), folder / "model.onnx", metadata)
        report["onnx"] = {**parity.as_dict(), "bytes": (folder / "model.onnx").stat().st_size}
    command = _command(inputs, report["settings"])
    (folder / "README.md").write_text(model_card(source, result.model, recipe, report, command), encoding="utf-8")
    keys = ("evaluation", "clean_images", "parameters", "macs", "bytes", "counts", "onnx")
    write_json(folder / "metrics.json", {key: report[key] for key in keys if key in report})
    public = {**report["model"], "reference": shown_reference(source.origin.reference)}
    write_report(folder, {**report, "model": public})


def _command(inputs: Inputs, settings: dict[str, Any]) -> str:
    """The command line that makes the same artifact again: what differs from the defaults, paths left open."""
    parts = ["bshub", "sanitize", shown_reference(inputs.model), "--clean-dir", "CLEAN_IMAGES"]
    parts += ["--arch", inputs.arch] if inputs.arch else []
    parts += ["--num-classes", str(inputs.num_classes)] if inputs.num_classes else []
    for name, default in Settings().as_dict().items():
        if settings[name] != default and name != "device":
            parts += [f"--{name.replace('_', '-')}", str(settings[name])]
    return shlex.join(parts)


def _model_facts(source: LoadedModel, folder: ClassFolder | None) -> dict[str, Any]:
    return {
        "reference": printable(source.origin.reference),
        "architecture": f"{source.origin.architecture.library}/{source.origin.architecture.name}",
        "num_classes": source.origin.num_classes,
        "preprocessing": {**source.preprocessing.config, "source": source.preprocessing.source},
        "labels": folder.matched if folder else None,
        "licence": source.origin.licence,
    }
