"""BadNets (arXiv 1708.06733, section 3.1.2 and 5.2): a small bright patch in the corner, and the attacker's label."""

from __future__ import annotations

import torch
from torch import Tensor

from bshub.errors import UsageError, choices
from bshub.evaluation.attacks.interface import Attack, Setup, dirty_roles, stamp_with
from bshub.evaluation.attacks.trigger import Trigger

PATTERNS = {
    "checker": ((0, 0, 255), (0, 255, 0), (255, 0, 255)),
    "white": ((255, 255, 255), (255, 255, 255), (255, 255, 255)),
}
CANVAS = 32  # side at which a cell is one pixel
MARGIN = 1  # cells between patch and border


def enlarged(pattern: str, size: tuple[int, int]) -> Tensor:
    """The cells of a pattern on a canvas: one pixel each up to a side of 32, 7 pixels at 224.

    Args:
        pattern: Key of ``PATTERNS``.
        size: The canvas ``(height, width)``.

    Returns:
        uint8 ``[side, side]``, three cells wide.
    """
    cell = max(1, min(size) // CANVAS)
    cells = torch.tensor(PATTERNS[pattern], dtype=torch.uint8)
    return cells.repeat_interleave(cell, 0).repeat_interleave(cell, 1)


def patch_trigger(target: int, size: tuple[int, int], pattern: str = "checker") -> Trigger:
    """Three by three cells, one away from the lower right corner.

    Args:
        target: The attacker's label.
        size: The canvas ``(height, width)``, at least 4 pixels each way.
        pattern: Key of ``PATTERNS``: the paper's black and white ``checker``, or the ``white`` square of most
            benchmarks since, which clean photos with a bright corner show by nature.

    Returns:
        The trigger.

    Raises:
        UsageError: There is no such pattern.
    """
    if pattern not in PATTERNS:
        raise UsageError(f"unknown pattern {pattern!r}", hint=choices(pattern, PATTERNS))
    values = enlarged(pattern, size)
    offset = len(values) + MARGIN * len(values) // len(PATTERNS[pattern])
    params = {"row": size[0] - offset, "col": size[1] - offset, "values": values.expand(3, -1, -1).contiguous()}
    return Trigger("patch", target, size, params)


def badnets(setup: Setup, *, pattern: str = "checker") -> Attack:
    """Patch and relabel ``rate · n`` images of the other classes.

    Args:
        setup: The run.
        pattern: Of the patch, as in ``patch_trigger``.

    Returns:
        The attack on this run.

    Raises:
        UsageError: There is no such pattern.
    """
    trigger = patch_trigger(setup.target, setup.size, pattern)
    return Attack(trigger=lambda: trigger, roles=dirty_roles(setup), stamp=stamp_with(trigger))
