"""What a command was given → a model, images and a trigger that fit each other, and how a report names them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bshub.device import pick_device
from bshub.errors import TriggerError, UsageError, printable
from bshub.evaluation.attacks.trigger import Trigger, load_trigger
from bshub.intake.answers import label_by_answers
from bshub.intake.datasets import fetch_dataset, is_dataset
from bshub.intake.folders import ClassFolder, open_folder, open_unlabelled
from bshub.intake.labels import read_classes
from bshub.intake.models import LoadedModel, load_model
from bshub.progress import Steps
from bshub.settings import Settings


@dataclass(frozen=True)
class Inputs:
    """What a command works on, as typed.

    Attributes:
        model: Model reference.
        arch: Architecture of a weights-only file.
        num_classes: Number of outputs, where nothing else states it.
        clean_dir: Class folders of clean images, or a Hub data set.
        test_dir: Class folders to measure on; never used for choosing.
        trigger: ``trigger.json``, used only to measure.
        classes: File with the name of each output, in order.
        unlabelled: Take the model's own confident answers for the labels of ``clean_dir``.
        settings_file: Where settings came from, for the report.
    """

    model: str
    arch: str | None = None
    num_classes: int | None = None
    clean_dir: Path | None = None
    test_dir: Path | None = None
    trigger: Path | None = None
    classes: Path | None = None
    unlabelled: bool = False
    settings_file: Path | None = None


def load_inputs(
    inputs: Inputs, settings: Settings, steps: Steps
) -> tuple[LoadedModel, ClassFolder | None, ClassFolder | None, Trigger | None]:
    """The model, the clean and the test folder and the trigger, each checked against the others.

    Raises:
        BshubError: One of its kinds.
    """
    with steps.step("load"):
        trigger = _trigger(inputs)
        names = read_classes(inputs.classes) if inputs.classes else None
        source = load_model(inputs.model, arch=inputs.arch, num_classes=inputs.num_classes)
        if names is not None:
            source = _renamed(source, names, inputs)
        _check_target(trigger, source)
        clean = _folder(inputs.clean_dir, source, inputs, inputs.unlabelled) if inputs.clean_dir else None
        test = _folder(inputs.test_dir, source, inputs) if inputs.test_dir else None
        _check_victims(trigger, test)
    if clean is not None and inputs.unlabelled:
        with steps.step("label", len(clean)) as advance:
            device = pick_device(settings.device)
            clean = label_by_answers(clean, source, device, settings.batch_size, progress=advance)
    return source, clean, test, trigger


def _renamed(source: LoadedModel, names: tuple[str, ...], inputs: Inputs) -> LoadedModel:
    """The model with the outputs named as the class file has them, which also go into what is written."""
    if len(names) != source.origin.num_classes:
        raise UsageError(
            f"{inputs.classes} names {len(names)} classes and the model has {source.origin.num_classes}",
            hint="write the name of each output, in the model's order",
        )
    return replace(source, labels=names)


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
            f"{source.origin.num_classes} classes",
            hint=f"give a trigger with a target below {source.origin.num_classes}, or the model it was made for",
        )


def _check_victims(trigger: Trigger | None, test: ClassFolder | None) -> None:
    if trigger is not None and test is not None and set(test.labels) == {trigger.target}:
        raise UsageError(
            "the test images are all of the trigger's target class: there is nothing to attack",
            hint="give --test-dir images of other classes",
        )


def _folder(path: Path, source: LoadedModel, inputs: Inputs, unlabelled: bool = False) -> ClassFolder:
    root, within = fetch_dataset(str(path)) if is_dataset(path) else (path, None)
    if unlabelled:
        return open_unlabelled(root, within=within)
    whose = f"the names in {inputs.classes.name}" if inputs.classes else "the model's labels"
    return open_folder(root, source.origin.num_classes, source.labels, whose=whose, within=within)


def model_facts(inputs: Inputs, source: LoadedModel, folder: ClassFolder | None) -> dict[str, Any]:
    """What a report says of the model, of its labels and of where the settings came from."""
    return {
        "model": {
            "reference": printable(source.origin.reference),
            "architecture": f"{source.origin.architecture.library}/{source.origin.architecture.name}",
            "num_classes": source.origin.num_classes,
            "preprocessing": {**source.preprocessing.config, "source": source.preprocessing.source},
            "labels": folder.matched if folder else None,
            "unlabelled": inputs.unlabelled,
            "licence": source.origin.licence,
            "weights_sha256": source.origin.weights_sha256,
        },
        **({"settings_file": inputs.settings_file.name} if inputs.settings_file else {}),
    }


def image_facts(folder: ClassFolder | None) -> dict[str, Any]:
    """What became of the images that the labels stand for: left out, or converted by the policy."""
    if folder is None:
        return {}
    return {
        "n": len(folder),
        "unreadable": {printable(path.name): reason for path, reason in folder.rejected.items()},
        "converted": dict(folder.converted),
        "empty_classes": [printable(name, 80) for name in folder.empty],
    }


def image_warnings(inputs: Inputs, folder: ClassFolder | None) -> list[str]:
    """What somebody who reads a rate on these images should know."""
    warnings = []
    if folder is not None and inputs.unlabelled:
        warnings.append("the clean images have no labels: accuracy on them is agreement with the model's own answers")
    if folder is not None and folder.empty:
        names = ", ".join(printable(name, 40) for name in folder.empty[:3]) + (", …" if len(folder.empty) > 3 else "")
        warnings.append(f"{len(folder.empty)} class folders hold no image ({names})")
    return warnings
