"""``NAME:key=value,…`` → a function from a model and clean images to a defended model.

``bshub`` is the default of ``bshub sanitize``, ``paper`` the reconstruction of arXiv 2311.07417; further names are the
keys of ``DEFENSES``. Options change one setting of the run: of ours by the name in ``Settings``, of a baseline by the
keyword of its function. That is how thresholds are swept and parts left out.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from bshub.clean import CleanImages
from bshub.errors import UsageError, choices
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.registry import DEFENSES, find_defense
from bshub.pipeline import sanitize
from bshub.settings import Settings
from bshub.stand_ins import StandIns

Batches = list[tuple[Tensor, Tensor]]
OURS = {name: Settings(method=name) for name in ("bshub", "paper")}


@dataclass(frozen=True)
class Method:
    """A method with its options.

    Attributes:
        name: Key of ``OURS`` or ``DEFENSES``.
        options: Changed settings.
    """

    name: str
    options: dict[str, Any]

    def run(
        self, model: nn.Module, clean: Batches | StandIns, seed: int, effort: float, device: str = "auto"
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Defend a copy of the model.

        Args:
            model: The network.
            clean: Clean batches, or what stands in for them.
            seed: Of everything random.
            effort: Share of a baseline's published iterations; ours has no published ones and ignores it.
            device: Where.

        Returns:
            The defended model, on the CPU, and what the method says of itself.
        """
        if self.name in OURS:
            settings = replace(OURS[self.name], seed=seed, device=device, **self.options)
            result = sanitize(model, clean, settings)
            threshold = result.report["diagnosis"]["threshold"]
            notes = {"mu": threshold["mu"], "counts": result.report["counts"], "repaired": result.report["repaired"]}
            return result.model, {**notes, "seconds": result.report["seconds"]}
        from bshub.device import pick_device

        if isinstance(clean, StandIns):
            raise UsageError(f"{self.name!r} needs clean images", hint="ask for one or more: --per-class 1")
        place = pick_device(device)
        defended = find_defense(self.name)(
            model.to(place), CleanImages(clean, place), DefenseSettings(seed=seed, effort=effort), **self.options
        )
        model.cpu()
        return defended.cpu(), {}


def parse_method(text: str) -> Method:
    """Read ``NAME`` or ``NAME:key=value,key=value``.

    Raises:
        UsageError: There is no such method or option.
    """
    name, _, rest = text.partition(":")
    if name not in OURS and name not in DEFENSES:
        raise UsageError(f"unknown method {name!r}", hint=choices(name, (*OURS, *DEFENSES)))
    if name in OURS:
        known = {field.name for field in fields(Settings)} - {"method", "seed", "device"}
    else:
        known = _keywords(find_defense(name))
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            raise UsageError(f"the method {name!r} has no option {part!r}", hint=f"it has {', '.join(sorted(known))}")
        options[key] = _value(value)
    method = Method(name, options)
    if name in OURS:
        replace(OURS[name], **options)  # refuses what no setting can be
    return method


def _keywords(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
