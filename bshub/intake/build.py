"""An architecture → a network without weights, its data config, and where its own weights are."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from bshub.errors import BshubError, ModelReferenceError
from bshub.intake.header import MAX_BYTES
from bshub.intake.preprocessing import override, torchvision_config
from bshub.intake.recipe import replace_stem
from bshub.intake.reference import Architecture

MAX_MODULES = 20_000  # timm's deepest networks have a fifth of that

_LARGE = "look at model_args in its config.json, or at the options of the reference"


def build(
    wanted: Architecture,
    num_classes: int | None,
    *,
    stem: str | None = None,
    want_weights: bool = False,
    max_bytes: int = MAX_BYTES,
) -> tuple[nn.Module, dict[str, Any], Any]:
    """Build the network without weights; returns it, its data config and where its own weights are.

    Args:
        wanted: Constructor and arguments.
        num_classes: Number of outputs; None leaves it to the constructor.
        stem: ``cifar`` replaces the stem.
        want_weights: Whether torchvision's weights are asked for.
        max_bytes: Largest network that is built.

    Raises:
        ModelReferenceError: There is no such network, its constructor refuses the arguments, or it is too large.
    """
    arguments = {key: value for key, value in wanted.arguments.items() if key != "num_classes"}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    try:
        with _bounded(max_bytes):
            if wanted.library == "timm":
                module, config, weights = _build_timm(wanted, arguments)
            else:
                module, config, weights = _build_torchvision(wanted, arguments, want_weights)
    except BshubError:
        raise
    except Exception as error:  # constructors raise anything for arguments they do not take
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise ModelReferenceError(
                f"{wanted.library}/{wanted.name} with these arguments does not fit into memory", hint=_LARGE
            ) from None
        raise ModelReferenceError(
            f"{wanted.library} cannot build {wanted.name!r}: {error}",
            hint=_LARGE,
        ) from None
    if stem or wanted.stem:
        replace_stem(module)
    return module.eval(), override(config, wanted.preprocessing), weights


@contextmanager
def _bounded(max_bytes: int) -> Iterator[None]:
    """Stop a constructor that somebody's config.json told to fill the memory: before its weights are drawn."""
    size, modules = 0, 0

    def count(owner: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal size
        size += tensor.numel() * tensor.element_size() if tensor is not None else 0
        if size > max_bytes:
            raise ModelReferenceError(f"the network has more than {max_bytes >> 20} MiB of weights", hint=_LARGE)

    def count_module(owner: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > MAX_MODULES:
            raise ModelReferenceError(f"the network has more than {MAX_MODULES} modules", hint=_LARGE)

    hooks = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
        register_module_module_registration_hook(count_module),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
