"""BadNets (arXiv 1708.06733, section 3.1.2 and 5.2): a small bright patch in the corner, and the attacker's label."""

from __future__ import annotations

import torch

from bshub.evaluation.attacks.interface import Attack, Setup, dirty_roles, stamp_with
from bshub.evaluation.attacks.trigger import Trigger

CELLS = ((0, 0, 255), (0, 255, 0), (255, 0, 255))
CANVAS = 32  # side at which a cell is one pixel
MARGIN = 1  # cells between patch and border


def patch_trigger(target: int, size: tuple[int, int]) -> Trigger:
    """The 3x3 pattern of black and white cells, a cell away from the lower right corner.

    A cell is one pixel up to a canvas of 32 pixels and grows with larger ones, 7 pixels at 224.

    Args:
        target: The attacker's label.
        size: The canvas ``(height, width)``, at least 4 pixels each way.

    Returns:
        The trigger.
    """
    cell = max(1, min(size) // CANVAS)
    values = torch.tensor(CELLS, dtype=torch.uint8).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    offset = (len(CELLS) + MARGIN) * cell
    params = {"row": size[0] - offset, "col": size[1] - offset, "values": values.expand(3, -1, -1).contiguous()}
    return Trigger("patch", target, size, params)


def badnets(setup: Setup) -> Attack:
    """Patch and relabel ``rate · n`` images of the other classes.

    Args:
        setup: The run.

    Returns:
        The attack on this run.
    """
    trigger = patch_trigger(setup.target, setup.size)
    return Attack(trigger=lambda: trigger, roles=dirty_roles(setup), stamp=stamp_with(trigger))
