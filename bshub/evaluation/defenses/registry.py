"""``DEFENSES``: the published methods that the benchmark compares with, one function each."""

from __future__ import annotations

from bshub.errors import UsageError
from bshub.evaluation.defenses.interface import Defense

DEFENSES: dict[str, Defense] = {}


def find_defense(name: str) -> Defense:
    """Look a defense up.

    Raises:
        UsageError: There is no such defense.
    """
    if name not in DEFENSES:
        raise UsageError(f"unknown method {name!r}", hint=f"one of {', '.join(DEFENSES)}")
    return DEFENSES[name]
