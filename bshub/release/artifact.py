"""What a run leaves on disk: weights, config with the recipe, metrics, card, ONNX, and the report last of all."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from bshub.errors import OutputError
from bshub.files import MANIFEST, json_text, sha256
from bshub.intake.models import LoadedModel
from bshub.intake.recipe import Recipe

WEIGHTS = "model.safetensors"


def write_model(folder: Path, model: nn.Module, source: LoadedModel, recipe: Recipe) -> None:
    """Write ``model.safetensors`` and ``config.json`` in timm's layout.

    Args:
        folder: Exists.
        model: The sanitized network.
        source: What it was loaded from.
        recipe: What surgery changed, this time and before.
    """
    write_weights(folder / WEIGHTS, model)
    write_json(folder / "config.json", model_config(model, source, recipe))


def write_weights(path: Path, model: nn.Module) -> None:
    """Write a network's state dict as safetensors.

    Raises:
        OutputError: There is no room for it.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what the library makes of a full disk
        raise OutputError(f"writing {path.name} failed: {error}", hint="free space, then rerun") from None
    path.chmod(0o644)  # the library writes it for the owner alone


def model_config(model: nn.Module, source: LoadedModel, recipe: Recipe) -> dict[str, Any]:
    """timm's config schema plus one ``bshub`` key."""
    return {**dense_config(model, source), "bshub": recipe.as_json()}


def dense_config(model: nn.Module, source: LoadedModel) -> dict[str, Any]:
    """timm's config schema alone, for a network that its library builds as it is."""
    origin, wanted = source.origin, source.origin.architecture
    pretrained: dict[str, Any] = {
        "custom_load": False,
        "num_classes": origin.num_classes,
        **source.preprocessing.config,
        "fixed_input_size": False,
    }
    if origin.licence:
        pretrained["license"] = origin.licence
    arguments = {key: value for key, value in wanted.arguments.items() if key != "num_classes"}
    config: dict[str, Any] = {
        "architecture": wanted.name if wanted.library == "timm" else f"{wanted.library}/{wanted.name}",
        "num_classes": origin.num_classes,
        "pretrained_cfg": pretrained,
    }
    features = getattr(model, "num_features", None)
    if isinstance(features, int):
        config["num_features"] = features
    if arguments:
        config["model_args"] = arguments
    if source.labels:
        config["label_names"] = list(source.labels)
    return config


def write_json(path: Path, data: Any) -> None:
    """Indented, UTF-8, ending in a newline; NaN is refused, and what could steer a terminal is escaped."""
    path.write_text(json_text(data), encoding="utf-8")


def write_report(folder: Path, report: dict[str, Any], created: datetime | None = None) -> None:
    """Write the report with the time and the digest of every other file: the last thing written but a signature."""
    created = created or datetime.now(UTC)  # a gate may refuse what is too old
    told = {**report, "created": created.isoformat(timespec="seconds"), "files": file_digests(folder)}
    write_json(folder / MANIFEST, told)


def file_digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Path → sha256 and bytes of every file of an artifact but its report, in the order of their names."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
