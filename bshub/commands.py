"""One function per command: references and folders in, folders and reports out. Knows nothing of a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bshub.clean import KEPT_IMAGES
from bshub.device import pick_device
from bshub.diagnosis import Diagnosis
from bshub.errors import PublishError, UsageError, printable
from bshub.evaluation.attacks.trigger import Trigger, resize_to
from bshub.evaluation.defenses.registry import find_defense
from bshub.evaluation.metrics import Evaluation, accuracy_lost, der, evaluate_models
from bshub.files import check_output, output_folder
from bshub.inputs import Inputs, image_facts, image_warnings, load_inputs, model_facts
from bshub.intake.folders import ClassFolder
from bshub.intake.models import LoadedModel
from bshub.parallel import Workers, launched
from bshub.pipeline import sanitize, scan
from bshub.progress import Progress, Steps
from bshub.release.publish import check_name, publish
from bshub.repair.finetune import find_repair
from bshub.scoring.suspiciousness import find_score
from bshub.settings import OURS, Settings
from bshub.stand_ins import StandIns
from bshub.writing import Wishes, write_artifact


def sanitize_to_folder(
    inputs: Inputs,
    settings: Settings,
    output: Path | None,
    *,
    overwrite: bool = False,
    wishes: Wishes | None = None,
    push_to: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Sanitize a model by reference and write the artifact.

    Args:
        inputs: Model and images; without ``clean_dir`` made-up images stand in.
        settings: Of the run.
        output: The artifact's folder; None: nothing is written (a dry run: no repair, no export).
        overwrite: Replace an earlier artifact there.
        wishes: What the artifact shall hold; everything but a dense copy by default.
        push_to: Hub repository that the artifact is published to.
        private: Whether a new repository is private.
        create_pr: Open a pull request instead of pushing.
        progress: Shows the steps.

    Returns:
        The report. Of several processes the first writes and measures, the others come back with what they know.

    Raises:
        BshubError: One of its kinds; nothing is left behind.
    """
    _check_names(settings)
    if inputs.clean_dir is None and (inputs.unlabelled or settings.method != "bshub"):
        what = "--unlabelled is about clean images" if inputs.unlabelled else f"{settings.method!r} needs clean images"
        raise UsageError(what, hint="add --clean-dir DIR; without images only the default method works")
    if push_to:
        check_name(push_to)  # not after an hour of work
    workers = launched(settings.device)
    if output is not None and workers.rank == 0:
        check_output(output, overwrite)
    steps = Steps(progress)
    source, clean, test, trigger = load_inputs(inputs, settings, steps)
    wishes = replace(wishes or Wishes(), repository=push_to)
    wishes.check(source)
    own = _own_part(clean, workers) if clean else None
    prepare, size = source.preprocessing, settings.batch_size
    batches = own.batches(prepare, size) if own else StandIns.like(prepare, seed=settings.seed, batch_size=size)
    total = len(own) if own else None
    if output is None:
        diagnosis = scan(source.module, batches, settings, total=total, workers=workers, progress=steps)
        return _judged(inputs, source, clean, diagnosis, steps)
    if workers.rank:
        return sanitize(source.module, batches, settings, total=total, workers=workers, progress=steps).report
    # Held from here on: a second run into the same folder is refused before it has worked for nothing.
    with output_folder(output, overwrite) as folder:
        result = sanitize(source.module, batches, settings, total=total, workers=workers, progress=steps)
        report = {**model_facts(inputs, source, clean), **result.report, "images": image_facts(clean)}
        report["warnings"] += image_warnings(inputs, clean)
        if test is not None:
            before, after = _measure([source.module, result.model], test, source, trigger, settings, steps)
            report["evaluation"] = {
                "before": before.as_dict(),
                "after": after.as_dict(),
                "accuracy_lost": accuracy_lost(before, after).as_dict(),
                "der": der(before, after),
                "test_images": len(test),
                "unreadable": {printable(path.name): reason for path, reason in test.rejected.items()},
            }
        write_artifact(folder, source, result, report, inputs, wishes, steps)
    if push_to:
        with steps.step("publish"):
            report["published"] = _publish(output, push_to, wishes, private, create_pr)
    return report


def _publish(output: Path, repo_id: str, wishes: Wishes, private: bool, create_pr: bool) -> dict[str, Any]:
    """Publish what lies in ``output``, which stays there where the Hub refuses."""
    try:
        shown = wishes.with_pictures
        return publish(output, repo_id, private=private, create_pr=create_pr, show_images=shown).as_dict()
    except PublishError as error:
        options = ["--private"] * private + ["--create-pr"] * create_pr + ["--show-images"] * wishes.with_pictures
        again = shlex.join(["bshub", "publish", str(output), "--repo", repo_id, *options])
        hint = f"{error.hint}; then: {again}" if error.hint else again
        raise PublishError(f"{error.message}; the sanitized model is whole in {output}", hint=hint) from None


def scan_reference(inputs: Inputs, settings: Settings, *, progress: Progress | None = None) -> dict[str, Any]:
    """Judge a model by reference and touch nothing.

    Args:
        inputs: The model and, where there are any, its clean images.
        settings: Score, μ, budget, batch size, device.
        progress: Shows the steps.

    Returns:
        The report; ``suspects`` lists the flagged filters with the highest scores.

    Raises:
        BshubError: One of its kinds.
    """
    _check_names(settings)
    steps = Steps(progress)
    source, clean, _, _ = load_inputs(inputs, settings, steps)
    workers = launched(settings.device)
    own = _own_part(clean, workers) if clean else None
    batches = own.batches(source.preprocessing, settings.batch_size) if own else None
    diagnosis = scan(
        source.module,
        batches,
        settings,
        input_size=source.preprocessing.input_size,
        total=len(own) if own else None,
        workers=workers,
        progress=steps,
    )
    suspects = [
        {"layer": name, "filter": index, "score": round(score, 3)}
        for name, index, score in diagnosis.most_suspicious(20)
    ]
    return {**_judged(inputs, source, clean, diagnosis, steps), "suspects": suspects}


def _check_names(settings: Settings) -> None:
    """Refuse a misspelt name before a model is loaded for nothing."""
    find_score(settings.score)
    find_repair(settings.repair)
    if settings.method not in OURS:
        find_defense(settings.method, OURS)


def _own_part(clean: ClassFolder, workers: Workers) -> ClassFolder:
    """What this process reads: some of every class among the first images, which are kept, and its part of all."""
    if len(clean) < workers.size:
        raise UsageError(
            f"{len(clean)} clean images are too few for {workers.size} processes", hint="call it without the launcher"
        )
    mixed = clean.mixed(KEPT_IMAGES)
    return mixed.part(workers.part(len(clean)))


def _judged(
    inputs: Inputs, source: LoadedModel, clean: ClassFolder | None, diagnosis: Diagnosis, steps: Steps
) -> dict[str, Any]:
    judged = diagnosis.as_dict()
    judged["warnings"] = [*judged["warnings"], *image_warnings(inputs, clean)]
    facts = {**model_facts(inputs, source, clean), "diagnosis": judged, **diagnosis.shrink_facts(diagnosis.plan)}
    return {**facts, "images": image_facts(clean), "seconds": steps.seconds}


def evaluate_reference(inputs: Inputs, settings: Settings, *, progress: Progress | None = None) -> dict[str, Any]:
    """Measure a model by reference on a test folder.

    Args:
        inputs: Model and images; ``test_dir`` is needed, ``trigger`` adds the attack's rates.
        settings: Batch size and device.
        progress: Shows the steps.

    Returns:
        The report.

    Raises:
        UsageError: There are no test images.
        BshubError: Another of its kinds.
    """
    if inputs.test_dir is None:
        raise UsageError("evaluate needs images", hint="add --test-dir DIR")
    steps = Steps(progress)
    source, _, test, trigger = load_inputs(inputs, settings, steps)
    assert test is not None
    (rates,) = _measure([source.module], test, source, trigger, settings, steps)
    report = {**model_facts(inputs, source, test), "evaluation": rates.as_dict(), "images": image_facts(test)}
    return {**report, "seconds": steps.seconds}


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
