"""Model + flagged filters → smaller model, proved equal to the masked original.

Requires: the model is in no particular mode and is not changed. Ensures: the result's logits equal the masked
original's on the given images, or nothing is returned. Groups that cannot be removed exactly are found by
bisection, kept in place (their filters silenced) and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from bshub.copying import copy_sharing
from bshub.errors import SurgeryError
from bshub.graph.channels import Ints
from bshub.graph.coupling import ChannelFlow
from bshub.graph.pairs import Pairing
from bshub.graph.pause import collector_paused
from bshub.scoring.plan import RemovalPlan, make_plan
from bshub.surgery.levels import asked_levels
from bshub.surgery.narrow import narrow, zero_columns, zero_silenced
from bshub.surgery.proof import Proof, compare


@dataclass(frozen=True)
class Removal:
    """A finished surgery.

    Attributes:
        model: The smaller model, in evaluation mode.
        plan: What was really removed and silenced.
        attributes: Module → attribute → new value: the recipe next to the tensors.
        proof: The comparison with the masked original.
        refused: Reasons for groups that the proof kept in place.
    """

    model: nn.Module
    plan: RemovalPlan
    attributes: dict[str, dict[str, Any]]
    proof: Proof
    refused: list[str]


def silence(model: nn.Module, plan: RemovalPlan) -> nn.Module:
    """The original with the plan's effect but no change of shape: the masked model of the proof.

    Args:
        model: The original; not changed.
        plan: What leaves and what is silenced.

    Returns:
        A copy.
    """
    masked = copy_sharing(model, lambda name: name not in plan.columns and name not in plan.zeroed)
    zero_silenced(masked, plan.zeroed)
    zero_columns(masked, plan)
    return masked


def remove(
    model: nn.Module,
    flow: ChannelFlow,
    pairing: Pairing,
    flagged: Mapping[str, Ints],
    images: Tensor,
    spare: Mapping[str, Ints] | None = None,
) -> Removal:
    """Remove the flagged filters, and the spare ones that can leave.

    Args:
        model: The network; not changed.
        flow: Its channels.
        pairing: Its conv-BN pairs.
        flagged: Convolution → suspicious filters.
        images: Real, normalised images for the proof, ``[n, channels, height, width]``.
        spare: Convolution → useless filters; where a group cannot be removed exactly they simply stay.

    Returns:
        The removal.

    Raises:
        SurgeryError: Even silencing in place does not compute what it should.
    """
    planned = partial(make_plan, flow, pairing, flagged, spare=spare)
    plan = planned()
    attempt, why = _attempt(model, plan, flow, images)
    if attempt is not None:
        return attempt
    blocks = _blocks(flow, plan)
    # Everything marked but not in a block was kept as the last of its axis: it stays so whatever is forbidden.
    slots = {conv.name: conv.slots for conv in (*pairing.pairs, *pairing.bare)}
    marked = [*flagged.items(), *(spare or {}).items()]
    touched = {int(g) for name, index in marked for g in flow.groups[slots[name][np.asarray(index, np.int64)]]}
    allowed = set().union(*blocks)
    guilty = _bisect(model, flow, planned, images, blocks, touched)
    plan = planned(forbidden=frozenset(touched - (allowed - guilty)))
    attempt, again = _attempt(model, plan, flow, images)
    if attempt is None:
        raise SurgeryError(
            f"the narrowed model does not compute what the masked one does: {again}",
            hint="nothing was written; rerun with a larger --mu, and report this network to the maintainers",
        )
    kept = f"{len(guilty)} channel groups stayed in place: removing them is not exact ({why})"
    return Removal(attempt.model, attempt.plan, attempt.attributes, attempt.proof, [kept])


@collector_paused()
def narrowed_copy(
    model: nn.Module, plan: RemovalPlan, flow: ChannelFlow, input_size: tuple[int, int, int]
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """The smaller model, unproved, and its changed attributes.

    Args:
        model: The original; not changed.
        plan: What leaves and what is silenced.
        flow: Channels and coupling groups.
        input_size: ``(channels, height, width)``.

    Returns:
        The model, and module → attribute → its new value.
    """
    cut = set(plan.kept)
    small = copy_sharing(model, cut.__contains__)
    attributes = narrow(small, plan, flow, input_size)
    zero_silenced(small, plan.zeroed_after())
    return small, attributes


def _attempt(model: nn.Module, plan: RemovalPlan, flow: ChannelFlow, images: Tensor) -> tuple[Removal | None, str]:
    masked = silence(model, plan)
    small, attributes = narrowed_copy(model, plan, flow, (images.shape[1], images.shape[2], images.shape[3]))
    try:
        proof = compare(small, masked, images)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        # a width that lives in code: the narrowed forward run does not fit together
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not proof.holds:
        return None, f"relative error {proof.error:.2g} in {proof.dtype}"
    levels = asked_levels(model, small, (images.shape[1], images.shape[2], images.shape[3]))
    if levels is not None:
        small.feature_info = levels  # type: ignore[assignment]
        attributes.setdefault("", {})["feature_info"] = levels
    return Removal(small, plan, attributes, proof, []), ""


def _blocks(flow: ChannelFlow, plan: RemovalPlan) -> list[set[int]]:
    """Leaving groups that share an axis: the units that fail or succeed together."""
    leader: dict[int, int] = {}
    for name, axes in plan.kept.items():
        for axis, kept in axes.items():
            slots = flow.channels.axes[name][axis]
            lost = np.setdiff1d(np.arange(len(slots)), kept)
            groups = np.unique(flow.groups[slots[lost]]).tolist()
            first = min(leader.get(group, group) for group in groups)
            for group in groups:
                leader[group] = min(first, leader.get(group, first))
    blocks: dict[int, set[int]] = {}
    for group, first in leader.items():
        blocks.setdefault(first, set()).add(group)
    return list(blocks.values())


def _bisect(
    model: nn.Module,
    flow: ChannelFlow,
    planned: Callable[..., RemovalPlan],
    images: Tensor,
    blocks: list[set[int]],
    everything: set[int],
) -> set[int]:
    """Groups whose removal, alone or together, is not exact."""
    if not blocks:
        return set()
    allowed = set().union(*blocks)
    plan = planned(forbidden=frozenset(everything - allowed))
    if _attempt(model, plan, flow, images[:2])[0] is not None:
        return set()
    if len(blocks) == 1:
        return set(blocks[0])
    half = len(blocks) // 2
    rest = (model, flow, planned, images)
    return _bisect(*rest, blocks[:half], everything) | _bisect(*rest, blocks[half:], everything)
