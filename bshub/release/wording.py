"""What the images that a run looked at are called: clean ones that were given, or stand-ins that were made up."""

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


def made_up(report: Mapping[str, Any]) -> bool:
    """Whether no clean images were given."""
    return bool(report["clean_images"].get("made_up"))
