"""BadNets (arXiv 1708.06733, section 3.1.2 and 5.2): a small bright patch in the corner, and the attacker's label."""

from __future__ import annotations

import torch

from bshub.errors import UsageError, choices
from bshub.evaluation.attacks.interface import Attack, Setup, dirty_roles, stamp_with
from bshub.evaluation.attacks.trigger import Trigger

PATTERNS = {
    "checker": ((0, 0, 255), (0, 255, 0), (255, 0, 255)),
    "white": ((255, 255, 255), (255, 255, 255), (255, 255, 255)),
}
CANVAS = 32  # side at which a cell is one pixel
MARGIN = 1  # cells between patch and border


def patch_trigger(target: int, size: tuple[int, int], pattern: str = "checker") -> Trigger:
    """Three by three cells, one away from the lower right corner.

    A cell is one pixel up to a canvas of 32 pixels and grows with larger ones, 7 pixels at 224.

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
    cells = PATTERNS[pattern]
    cell = max(1, min(size) // CANVAS)
    values = torch.tensor(cells, dtype=torch.uint8).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    offset = (len(cells) + MARGIN) * cell
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
