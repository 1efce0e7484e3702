"""What card, page and bill of materials say of a run alike: its images, given or made up, and its repair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def images_name(report: Mapping[str, Any]) -> str:
    """``clean images`` or ``made-up images``."""
    return "made-up images" if made_up(report) else "clean images"


def rate_name(report: Mapping[str, Any]) -> str:
    """What a rate on them is; the labels of made-up images are the original's own answers."""
    if made_up(report):
        return "answers as before on made-up images"
    return "accuracy on the clean images used"


def repair_passes(report: Mapping[str, Any]) -> int:
    """Passes that the repair took; reports from before it could take more than it was told state only those."""
    return int(report.get("repair_passes", report["settings"]["finetune_epochs"]))


def hardened(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far the network was hardened, where nothing was found and the hardening stayed."""
    return (report.get("hardening") or None) if report["repaired"] else None


def mended(report: Mapping[str, Any]) -> str:
    """``hardened`` or ``repaired``: what was done to the weights that are left."""
    return "hardened" if hardened(report) else "repaired"


def made_up(report: Mapping[str, Any]) -> bool:
    """Whether no clean images were given."""
    return bool(report["clean_images"].get("made_up"))
