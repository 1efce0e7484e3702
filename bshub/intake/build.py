"""An architecture → a network without weights, its data config, and where its own weights are."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from bshub.errors import BshubError, ModelReferenceError
from bshub.intake.preprocessing import override, torchvision_config
from bshub.intake.recipe import replace_stem
from bshub.intake.reference import Architecture


def build(
    wanted: Architecture, num_classes: int | None, *, stem: str | None = None, want_weights: bool = False
) -> tuple[nn.Module, dict[str, Any], Any]:
    """Build the network without weights; returns it, its data config and where its own weights are."""
    arguments = {key: value for key, value in wanted.arguments.items() if key != "num_classes"}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    try:
        if wanted.library == "timm":
            module, config, weights = _build_timm(wanted, arguments)
        else:
            module, config, weights = _build_torchvision(wanted, arguments, want_weights)
    except BshubError:
        raise
    except Exception as error:  # constructors raise anything for arguments they do not take
        raise ModelReferenceError(f"{wanted.library} cannot build {wanted.name!r}: {error}") from None
    if stem or wanted.stem:
        replace_stem(module)
    return module.eval(), override(config, wanted.preprocessing), weights


def _build_timm(wanted: Architecture, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], Any]:
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(wanted.name):
        _unknown("timm", wanted.name, timm.list_models())
    name = f"{wanted.name}.{wanted.tag}" if wanted.tag else wanted.name
    if wanted.tag and name not in timm.list_pretrained():
        tags = [model for model in timm.list_pretrained(f"{wanted.name}.*")]
        raise ModelReferenceError(f"timm has no weights {name!r}", hint="it has " + (", ".join(tags) or "none"))
    module = timm.create_model(name, pretrained=False, **arguments)
    return module, dict(resolve_model_data_config(module)), module.pretrained_cfg and _ConfigView(module)


class _ConfigView:
    """The entries of timm's pretrained configuration that say where weights are."""

    def __init__(self, module: Any) -> None:
        config = module.pretrained_cfg
        self.hf_hub_id = config.get("hf_hub_id")
        self.hf_hub_filename = config.get("hf_hub_filename")
        self.license = config.get("license")


def _build_torchvision(
    wanted: Architecture, arguments: dict[str, Any], want_weights: bool
) -> tuple[nn.Module, dict[str, Any], Any]:
    from torchvision import models

    known = models.list_models(module=models)
    if wanted.name not in known:
        _unknown("torchvision", wanted.name, known)
    entries = models.get_model_weights(wanted.name)
    try:
        entry = entries[wanted.tag] if wanted.tag else entries.DEFAULT  # type: ignore[attr-defined]
    except KeyError:
        names = ", ".join(item.name for item in entries)
        raise ModelReferenceError(f"{wanted.name} has no weights {wanted.tag!r}", hint=f"it has {names}") from None
    if wanted.name in ("googlenet", "inception_v3") and "init_weights" not in arguments:
        arguments = {**arguments, "init_weights": False}  # slow, and overwritten by the checkpoint
    module = models.get_model(wanted.name, weights=None, **arguments)
    module.label_names = list(entry.meta.get("categories", ()))
    return module, torchvision_config(entry.transforms()), entry.url if want_weights else None


def _unknown(library: str, name: str, known: list[str]) -> None:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {library}/{near[0]}?" if near else f"see the list of {library}'s models"
    raise ModelReferenceError(f"{library} has no model {name!r}", hint=hint)
