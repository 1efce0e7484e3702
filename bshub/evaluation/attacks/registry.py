"""``ATTACKS``: how a backdoor gets into a model, one function each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bshub.errors import UsageError, choices
from bshub.evaluation.attacks.adaptive import adaptive
from bshub.evaluation.attacks.badnets import badnets
from bshub.evaluation.attacks.blended import blended
from bshub.evaluation.attacks.input_aware import input_aware
from bshub.evaluation.attacks.interface import Attack, Setup
from bshub.evaluation.attacks.label_consistent import label_consistent
from bshub.evaluation.attacks.sig import sig
from bshub.evaluation.attacks.wanet import wanet


def none(setup: Setup) -> Attack:
    """No attack: the clean control.

    Args:
        setup: The run.

    Returns:
        An attack that poisons nothing and has no trigger.
    """
    roles = torch.zeros(len(setup.labels), dtype=torch.uint8)
    return Attack(trigger=lambda: None, roles=lambda epoch: roles)


ATTACKS: dict[str, Callable[..., Attack]] = {
    "none": none,
    "badnets": badnets,
    "blended": blended,
    "blended-noise": partial(blended, pattern="noise"),
    "wanet": wanet,
    "input-aware": input_aware,
    "sig": sig,
    "label-consistent": label_consistent,
    "adaptive": adaptive,
}


def find_attack(name: str, options: dict[str, Any]) -> Callable[[Setup], Attack]:
    """Look an attack up and bind its hyper-parameters.

    Args:
        name: Key of ``ATTACKS``.
        options: Keyword arguments of its function.

    Returns:
        A function from a run to its attack.

    Raises:
        UsageError: There is no such attack, or it has no such hyper-parameter.
    """
    if name not in ATTACKS:
        raise UsageError(f"unknown attack {name!r}", hint=choices(name, ATTACKS))
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(ATTACKS[name]).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    for key, value in options.items():
        if key not in defaults:
            raise UsageError(
                f"the attack {name!r} has no option {key!r}",
                hint=f"it has {', '.join(f'{k}={v}' for k, v in defaults.items()) or 'none'}",
            )
        if not _fits(value, defaults[key]):
            raise UsageError(
                f"{key} is like {defaults[key]!r}, not {value!r}",
                hint="leave --option away for the default; docs/attacks.md says what it does",
            )
    return partial(ATTACKS[name], **options)


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, float):
        return type(value) in (int, float)
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and all(type(v) is type(default[0]) for v in value)
    return type(value) is type(default)
