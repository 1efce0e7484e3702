"""Whether a network needs a repair, or is hardened, how far that goes, and whether it may stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from bshub.clean import CleanImages
from bshub.device import has_bf16
from bshub.evaluation.metrics import Rate, clean_accuracy
from bshub.parallel import Workers
from bshub.progress import Steps
from bshub.repair.finetune import Schedule, epochs_of, find_repair, repair
from bshub.repair.hardening import AGREES, Hardening, harden, passes_of
from bshub.repair.unlearning import by_chance, held_against, keep_disarmed, tolerated
from bshub.scoring.inversion import InvertedTrigger
from bshub.settings import Settings

WORSE = 0.05  # accuracy on the clean images that a repair may cost before it is undone
WORSE_MADE_UP = 0.35  # of made-up ones: near the borders between classes a quarter changed where accuracy lost 3 points
SHOWS_LOSS = 50  # clean images; fewer do not show a loss of two points
SLOW_BF16 = "this processor has no units for bf16, in which the repair may take many times as long: --precision fp32"
NOTHING = "nothing was found and nothing removed"
UNHELD = "to harden takes a search for a trigger, real images of every class, and a repair that learns from the model"
UNDONE = "the repair made the model worse and was undone: a lower --finetune-lr may help"


@dataclass(frozen=True)
class Outcome:
    """What became of a repair.

    Attributes:
        done: Whether the weights are repaired ones.
        why: In words.
        accuracy: On the clean images, afterwards.
        passes: Over the images that it took, 0 if none was tried.
        unlearning: Success of the sharpened triggers ``before`` and ``after``, and the ``share`` of the way that was
            kept; None without triggers or without a repair.
        hardening: How far the network was hardened, where nothing was found; None where it was not tried.
        warnings: What a user should know.
    """

    done: bool
    why: str
    accuracy: Rate
    passes: int = 0
    unlearning: dict[str, float] | None = None
    hardening: Hardening | None = None
    warnings: tuple[str, ...] = ()


def bring_back(
    pruned: nn.Module,
    original: nn.Module,
    clean: CleanImages,
    before: Rate,
    settings: Settings,
    steps: Steps,
    *,
    removed: bool,
    zeroed: dict[str, list[int]],
    triggers: Sequence[InvertedTrigger] = (),
    searched: bool = False,
    compared: bool = False,
    workers: Workers | None = None,
) -> Outcome:
    """Repair a pruned network, in place, where there is anything to repair; harden one in which nothing was found.

    Args:
        pruned: The network after surgery, in evaluation mode.
        original: The network as it was.
        clean: The clean images.
        before: Accuracy of the original on them.
        settings: Repair, epochs, learning rate, batch size, seed, precision.
        steps: Where the work is shown.
        removed: Whether anything was pruned.
        zeroed: Filters that must stay silent, by convolution.
        triggers: Inverted triggers.
        searched: Whether a trigger was looked for.
        compared: Whether there were enough classes for the search to compare; else nobody is hardened.
        workers: Processes that share the images.

    Returns:
        What became of it.
    """
    now = clean_accuracy(pruned, clean.batches(settings.batch_size))
    if not settings.finetune_epochs:
        return Outcome(False, "none was asked for", now)
    schedule = Schedule(
        settings.finetune_epochs, settings.finetune_lr, settings.batch_size, settings.seed, settings.precision
    )
    half = settings.precision == "bf16"
    if not (removed or triggers):
        if not settings.harden:
            return Outcome(False, NOTHING, now)
        if not (compared and _holds_on(clean, settings)):
            return Outcome(False, f"{NOTHING}; {UNHELD}", now)
        return _hardened(pruned, original, clean, schedule, steps, workers)
    held = held_against(pruned, triggers, clean, half)
    unlearns = held > tolerated(len(clean.labels))  # else the triggers fail already, and accuracy is all there is
    if searched and not unlearns and before.n >= SHOWS_LOSS and now.value >= before.value:
        # what the network was before may teach the backdoor again
        return Outcome(False, f"pruning cost no accuracy on the {before.n} clean images", now)
    weights = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    passes = epochs_of(schedule, len(clean.images), unlearns)
    with steps.step("repair", passes) as advance:
        repair(
            pruned, original, clean.images, clean.labels, zeroed, settings.repair, schedule,
            triggers=triggers if unlearns else (), workers=workers, progress=advance,
        )  # fmt: skip
    share = 1.0 if unlearns else keep_disarmed(pruned, weights, triggers, clean, half)
    after = clean_accuracy(pruned, clean.batches(settings.batch_size))
    left = held_against(pruned, triggers, clean, half)
    why = "what was left of the trigger was unlearned" if unlearns else "accuracy was brought back"
    if share < 1:
        why = f"{why} {100 * share:.0f} % of the way; further on the trigger works again"
    outcome = Outcome(share > 0, why, after, passes, warnings=_slow(half, clean))
    if triggers:
        outcome = replace(outcome, unlearning={"before": held, "after": left, "share": share})
    # what is left of the trigger is worth as much as what is left of the accuracy
    allowed = max(WORSE_MADE_UP if clean.made_up else by_chance(WORSE, len(clean.labels)), held - left)
    if not _finite(pruned) or after.value < now.value - allowed:
        pruned.load_state_dict(weights)
        return replace(
            outcome, done=False, why="it made the model worse", accuracy=now, warnings=(*outcome.warnings, UNDONE)
        )
    return outcome


def _holds_on(clean: CleanImages, settings: Settings) -> bool:
    """Whether the clean images can hold on to all that the network does: real ones of every class, and a teacher."""
    whole = len(clean.labels.unique()) == clean.classes
    return whole and not clean.made_up and find_repair(settings.repair).mixes


def _hardened(
    model: nn.Module, original: nn.Module, clean: CleanImages, schedule: Schedule, steps: Steps, workers: Workers | None
) -> Outcome:
    with steps.step("hardening", passes_of(schedule, len(clean.images))) as advance:
        done = harden(model, clean.images, clean.labels, schedule, original, workers=workers, progress=advance)
    after = clean_accuracy(model, clean.batches(schedule.batch_size))
    why = f"hardened against faint waves; {100 * done.agreement:.0f} % of mixtures are answered as before"
    if not done.share:
        why = f"nothing was found, and hardening would change more than {100 * (1 - AGREES):.0f} % of the answers"
    slow = _slow(schedule.precision == "bf16", clean)
    return Outcome(done.share > 0, why, after, done.passes, hardening=done, warnings=slow)


def _slow(half: bool, clean: CleanImages) -> tuple[str, ...]:
    return (SLOW_BF16,) if half and not has_bf16(clean.images.device) else ()


def _finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())
