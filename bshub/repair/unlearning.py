"""How much of a trigger is left in a network, and how much of a repair may stay if none is to come back.

Where pruning has disarmed the triggers, the repair only has to bring accuracy back, by learning from the network as it
was; but that one holds the backdoor, and some of it is learned again. So of the way from the pruned weights to the
repaired ones as much is kept as leaves the triggers without success (weights between two fine tunings of one network
work: Wortsman et al., *Robust fine-tuning of zero-shot models*, CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from bshub.clean import CleanImages
from bshub.device import in_bf16
from bshub.graph.trace import in_mode
from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.statistics import asking_only

LITTLE = 0.12  # success of a trigger, sharpened against the network, that is no more than other classes would have
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the way
TRIES = 8  # steps that each trigger gets against the network
BATCH = 32


def held_against(
    model: nn.Module, triggers: Sequence[InvertedTrigger], clean: CleanImages, half: bool = False
) -> float:
    """Success of the triggers on the clean images of other classes, after each was sharpened against the network.

    Args:
        model: In evaluation mode; not changed.
        triggers: They stay as they are.
        clean: The clean images.
        half: Whether to compute in bfloat16.

    Returns:
        The largest share of them all, 0 to 1; 0 without triggers.
    """
    worst = 0.0
    for trigger in triggers:
        others = clean.images[clean.labels != trigger.target]
        trying = trigger.copy()
        with in_mode(model, False), asking_only(model, []):
            for part in (others.split(BATCH) * TRIES)[:TRIES] if len(others) else ():
                trying.sharpen(model, part, half)
        with in_bf16(clean.images.device, half):
            worst = max(worst, trying.success(model, clean.images, clean.labels))
    return worst


def by_chance(share: float, images: int) -> float:
    """That share and one standard error of it: of ten images a single one is a tenth.

    Args:
        share: 0 to 1.
        images: That it is counted on.

    Returns:
        A share.
    """
    return share + (share * (1 - share) / max(images, 1)) ** 0.5


def tolerated(images: int) -> float:
    """Success up to which a trigger counts as gone: ``LITTLE`` and one standard error of a share of that many images.

    Args:
        images: Clean images that it was counted on.

    Returns:
        A share, 0 to 1.
    """
    return by_chance(LITTLE, images)


def keep_disarmed(
    model: nn.Module,
    before: Mapping[str, Tensor],
    triggers: Sequence[InvertedTrigger],
    clean: CleanImages,
    half: bool = False,
) -> float:
    """Go back toward the weights before the repair, until the triggers have no more success than is tolerated.

    Args:
        model: The repaired network; its weights are changed.
        before: Its ``state_dict`` before the repair, where the triggers fail.
        triggers: Inverted triggers.
        clean: The clean images.
        half: Whether to compute in bfloat16.

    Returns:
        The share of the way that was kept, 0 to 1.
    """
    return keep_share(model, before, lambda: held_against(model, triggers, clean, half) <= tolerated(len(clean.labels)))


def keep_share(
    model: nn.Module, before: Mapping[str, Tensor], good: Callable[[], bool], shares: Sequence[float] = SHARES
) -> float:
    """Go back toward the weights before a repair, until the network is good.

    Args:
        model: The repaired network; its weights are changed.
        before: Its ``state_dict`` before the repair.
        good: Asked of the network at each of the shares.
        shares: Of the way, the largest first.

    Returns:
        The largest share at which it is good; 0 if at none.
    """
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for share in shares:
        between = {
            name: before[name].lerp(tensor, share) if tensor.is_floating_point() else tensor
            for name, tensor in after.items()
        }
        model.load_state_dict(between)
        if good():
            return share
    model.load_state_dict(before)
    return 0.0
