"""SIG (arXiv 1902.11237, section 3): a faint horizontal sinusoid on images of the target class; no label is changed."""

from __future__ import annotations

from bshub.errors import UsageError
from bshub.evaluation.attacks.interface import Attack, Setup, clean_label_roles, stamp_with
from bshub.evaluation.attacks.trigger import Trigger


def sig(setup: Setup, delta: float = 20.0, frequency: float = 6.0) -> Attack:
    """Add ``v(i, j) = Δ · sin(2π · j · f / m)``, j = 1…m the column, to ``rate · n`` images of the target class.

    Args:
        setup: The run.
        delta: Amplitude Δ in grey levels, in training and at test.
        frequency: Periods f across the image.

    Returns:
        The attack on this run.

    Raises:
        UsageError: A hyper-parameter is out of its range.
    """
    if not (0 < delta <= 255 and 0 < frequency <= setup.size[1]):
        raise UsageError(
            "delta must lie in (0, 255], frequency in (0, width]",
            hint="leave --option away for the default; docs/attacks.md says what it does",
        )
    params = {"delta": float(delta), "frequency": float(frequency)}
    trigger = Trigger("sinusoid", setup.target, setup.size, params)
    return Attack(
        trigger=lambda: trigger, roles=clean_label_roles(setup), stamp=stamp_with(trigger), notes=dict(params)
    )
