"""``sanitize`` and ``scan``: the rooms in their order, on a model and clean batches in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bshub.clean import CleanImages
from bshub.device import pick_device, pick_precision
from bshub.diagnosis import WEIGHTS_ONLY_SCORE, Diagnosis, diagnose
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.registry import find_defense
from bshub.graph.cost import count_macs
from bshub.graph.trace import record
from bshub.mending import bring_back
from bshub.parallel import Workers
from bshub.progress import Progress, Steps
from bshub.repair.finetune import find_repair
from bshub.scoring.plan import RemovalPlan, as_arrays
from bshub.settings import OURS, Settings
from bshub.stand_ins import StandIns
from bshub.surgery.remove import Removal, remove

Batches = Iterable[tuple[Tensor, Tensor]]

PROOF_IMAGES = 16
LOST = 0.1  # accuracy on the clean images whose loss deserves a warning


@dataclass(frozen=True)
class SanitizeResult:
    """A sanitized model.

    Attributes:
        model: The smaller, repaired network, in evaluation mode, on the CPU.
        plan: What was removed and silenced.
        report: Everything that was measured, JSON-able.
        removal: The surgery with its proof and recipe.
        diagnosis: Scores and threshold.
        clean: The clean images that were used.
    """

    model: nn.Module
    plan: RemovalPlan
    report: dict[str, Any]
    removal: Removal
    diagnosis: Diagnosis
    clean: CleanImages


def sanitize(
    model: nn.Module,
    loader: Batches | StandIns,
    settings: Settings | None = None,
    *,
    total: int | None = None,
    workers: Workers | None = None,
    progress: Progress | Steps | None = None,
) -> SanitizeResult:
    """Find suspicious filters with clean images, remove them, repair the network.

    With ``settings.shrink`` the least useful filters leave too, as far as the budget allows.

    Args:
        model: Any CNN classifier with batch norm; it is not changed. Half precision is worked on in float32.
        loader: Clean ``(images [n, c, h, w], labels [n])``, normalised as the model expects; iterated once. Where there
            are none: ``StandIns(input_size)``.
        settings: Defaults otherwise.
        total: Number of images in the loader, for the progress bar; a DataLoader knows.
        workers: Processes that all call this with their own part of the images, see ``bshub.parallel.launched``.
        progress: Shows the steps.

    Returns:
        The result, the same in every process. If nothing looks suspicious the model is an unchanged copy, or with
        ``settings.harden`` one that is hardened against faint waves.

    Raises:
        InconclusiveError: Too few images, or no conv-BN pair.
        TraceError: The model does not run on the images.
        SurgeryError: The smaller model could not be proved equal to the masked one.
        UsageError: There is no such method, score or repair.
    """
    settings = (settings or Settings()).resolved()
    steps = progress if isinstance(progress, Steps) else Steps(progress)
    device = pick_device(settings.device)
    find_repair(settings.repair)
    defense = None if settings.method in OURS else find_defense(settings.method, OURS)
    original = _working_copy(model, device)
    settings = replace(settings, precision=pick_precision(settings.precision, original, device))
    clean = _images(original, loader, device, total, workers)
    # a baseline does what it does: nobody asks for a trigger then
    looking = replace(settings, score=WEIGHTS_ONLY_SCORE) if defense else settings
    diagnosis = diagnose(original, clean.input_size, clean, looking, steps, workers)
    flagged = {} if defense else diagnosis.plan.flagged  # the surgery then removes nothing
    with steps.step("surgery"):
        images, spare = clean.images[:PROOF_IMAGES], as_arrays(diagnosis.plan.spare)
        removal = remove(original, diagnosis.flow, diagnosis.pairing, as_arrays(flagged), images, spare)
    small = removal.model
    if defense:
        with steps.step(settings.method) as advance:
            told = DefenseSettings(settings.seed, effort=settings.effort, progress=advance)
            small = defense(original, clean, told).eval()
        removal = replace(removal, model=small)
    assert diagnosis.clean_accuracy is not None
    before, shortcut = diagnosis.clean_accuracy, diagnosis.shortcut
    outcome = bring_back(
        small,
        original,
        clean,
        before,
        settings,
        steps,
        removed=bool(removal.plan.flagged or removal.plan.spare),
        zeroed=removal.plan.zeroed_after(),
        triggers=shortcut.triggers if shortcut and not defense else (),
        searched=shortcut is not None,
        compared=shortcut is not None and shortcut.searched,
        workers=workers,
    )
    after, warnings = outcome.accuracy, [*diagnosis.warnings, *outcome.warnings]
    if clean.made_up:
        warnings.append(
            f"no clean images were given: {clean.count} made-up ones stood in for them, on which no accuracy can be "
            "counted; measure the result with --test-dir before you use it"
        )
    elif after.value < before.value - LOST:
        warnings.append(
            f"accuracy on the clean images fell from {100 * before.value:.0f} to "
            f"{100 * after.value:.0f} %: a higher --mu{' or a lower --shrink' if settings.shrink else ''} removes less"
        )
    report = {
        "settings": settings.as_dict(),
        "diagnosis": diagnosis.as_dict(),
        "counts": diagnosis.counts(removal.plan),
        **diagnosis.shrink_facts(removal.plan),
        "removed": removal.plan.removed,
        "silenced": removal.plan.silenced,
        "followers": removal.plan.followers,
        "stays": removal.plan.stays,
        "refused": removal.refused,
        "proof": removal.proof.as_dict(),
        "repaired": outcome.done,
        "repair": outcome.why,
        "repair_passes": outcome.passes,
        "trigger_success": outcome.unlearning,
        "hardening": None if outcome.hardening is None else asdict(outcome.hardening),
        "clean_images": {
            "n": clean.count,
            "made_up": clean.made_up,
            "accuracy_before": before.as_dict(),
            "accuracy_after": after.as_dict(),
        },
        "parameters": {"before": _parameters(original), "after": _parameters(small)},
        "macs": {
            "before": count_macs(diagnosis.recording),
            "after": count_macs(record(small, clean.input_size)),
        },
        "seconds": steps.seconds,
        "warnings": warnings,
    }
    return SanitizeResult(small.cpu().eval(), removal.plan, report, removal, diagnosis, clean)


def scan(
    model: nn.Module,
    loader: Batches | StandIns | None = None,
    settings: Settings | None = None,
    *,
    input_size: tuple[int, int, int] | None = None,
    total: int | None = None,
    workers: Workers | None = None,
    progress: Progress | Steps | None = None,
) -> Diagnosis:
    """Find suspicious filters and touch nothing.

    Args:
        model: Any CNN classifier with batch norm; it is not changed.
        loader: Clean batches; without them the weights alone are judged.
        settings: Defaults otherwise.
        input_size: ``(channels, height, width)``; needed where there is no loader.
        total: Number of images in the loader, for the progress bar; a DataLoader knows.
        workers: Processes that all call this with their own part of the images, see ``bshub.parallel.launched``.
        progress: Shows the steps.

    Returns:
        The diagnosis, the same in every process.

    Raises:
        InconclusiveError: Too few images, or no conv-BN pair.
        TraceError: The model does not run.
    """
    settings = settings or Settings()
    steps = progress if isinstance(progress, Steps) else Steps(progress)
    device = pick_device(settings.device)
    original = _working_copy(model, device)
    settings = replace(settings, precision=pick_precision(settings.precision, original, device))
    clean = _images(original, loader, device, total, workers) if loader is not None else None
    size = clean.input_size if clean is not None else input_size or (3, 224, 224)
    return diagnose(original, size, clean, settings, steps, workers)


def _working_copy(model: nn.Module, device: torch.device) -> nn.Module:
    # channels last may crash narrow convolutions in training (see layout_for), and pruned ones are narrow
    return copy.deepcopy(model).to(device, memory_format=torch.contiguous_format).float().eval()  # type: ignore[call-overload]


def _images(
    model: nn.Module, loader: Batches | StandIns, device: torch.device, total: int | None, workers: Workers | None
) -> CleanImages:
    if not isinstance(loader, StandIns):
        return CleanImages(loader, device, total, workers)
    part = (workers or Workers()).part(len(loader))
    return CleanImages(loader.answered_by(model, part), device, part.stop - part.start, workers, made_up=True)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
