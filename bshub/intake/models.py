"""A model reference → a network with its weights, its preprocessing and its labels."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bshub.errors import CheckpointError, ModelReferenceError
from bshub.files import MANIFEST, recorded_sha256, sha256
from bshub.intake.build import build
from bshub.intake.checkpoint import read_checkpoint
from bshub.intake.header import MAX_BYTES
from bshub.intake.hub import fetch, split_reference
from bshub.intake.licence import licence_beside, licence_on_hub
from bshub.intake.loading import load_into
from bshub.intake.preprocessing import Preprocessing, make_preprocessing, override
from bshub.intake.recipe import Recipe, apply_recipe
from bshub.intake.reference import FORBIDDEN_ARGUMENTS, Architecture, Reference, parse_architecture, parse_reference
from bshub.intake.weights_url import fetch_url

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# A network is built at its full width before a recipe narrows it; how much larger than its file it may be.
_PRUNED, _SMALL = 64, 256 << 20


@dataclass(frozen=True)
class Origin:
    """What a model is and where it came from.

    Attributes:
        reference: As typed.
        architecture: How the network is built.
        num_classes: Number of outputs.
        recipe: What an earlier surgery changed.
        licence: The licence its source states, if any.
        base_model: Hub id of its source, if it has one.
        weights_sha256: Of the file that its weights were read from.
    """

    reference: str
    architecture: Architecture
    num_classes: int
    recipe: Recipe
    licence: str | None
    base_model: str | None
    weights_sha256: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A network ready for use: in evaluation mode, on the CPU.

    Attributes:
        module: The network.
        preprocessing: uint8 image → the network's input.
        labels: Name of each output, None where nothing names them.
        origin: What it is and where it came from.
    """

    module: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    origin: Origin


def load_model(reference: str, *, arch: str | None = None, num_classes: int | None = None) -> LoadedModel:
    """Load a model by reference.

    Args:
        reference: See ``reference.py``.
        arch: Architecture of a weights-only file.
        num_classes: Number of outputs, where neither config nor reference states it.

    Returns:
        The model.

    Raises:
        ModelReferenceError: The reference leads nowhere.
        CheckpointError: The weights are not admissible or do not fit.
    """
    parsed = parse_reference(reference)
    given = parse_architecture(arch) if arch else None
    if parsed.architecture:
        return _from_library(parsed.architecture, parsed.text, num_classes)
    if parsed.path is not None and parsed.path.is_file():
        if given is None:
            raise ModelReferenceError(
                f"{parsed.text} holds weights alone; what network are they for?",
                hint=f"bshub … {parsed.text} --arch timm/NAME",
            )
        return _from_file(parsed.path, given, parsed.text, num_classes)
    return _from_folder(parsed, given, num_classes)


def _from_library(wanted: Architecture, text: str, num_classes: int | None) -> LoadedModel:
    """timm's or torchvision's own pretrained weights, fetched as a file and admitted like any other."""
    module, config, weights = build(wanted, _classes(wanted, num_classes), want_weights=True)
    if isinstance(weights, str):
        path = fetch_url(weights, Path(torch.hub.get_dir()) / "checkpoints")  # noqa: TID251 - only its cache path
        licence, base = None, None
    else:
        repository = getattr(weights, "hf_hub_id", None)
        if not repository:
            raise ModelReferenceError(
                f"timm has no pretrained weights for {wanted.name!r}", hint="give a weights file with --arch " + text
            )
        path = fetch(repository, getattr(weights, "hf_hub_filename", None) or "model.safetensors")
        licence, base = getattr(weights, "license", None), repository
    state = read_checkpoint(path)
    load_into(module, state, origin=text)
    labels = _imagenet_labels(module)
    source = f"{wanted.library}'s own configuration"
    return _loaded(module, wanted, text, config, source, labels, Recipe(), licence, base, path)


def _from_file(path: Path, wanted: Architecture, text: str, num_classes: int | None) -> LoadedModel:
    """A file of weights with a stated architecture."""
    module, config, _ = build(wanted, _classes(wanted, num_classes))
    load_into(module, read_checkpoint(path), origin=text)
    source, recipe = f"--arch ({wanted.library})", Recipe(stem=wanted.stem)
    return _loaded(module, wanted, text, config, source, None, recipe, None, None, path)


def _from_folder(parsed: Reference, given: Architecture | None, num_classes: int | None) -> LoadedModel:
    """timm's layout or a bshub artifact, on disk or on the Hub."""
    base, revision = None, None
    if parsed.path is not None:
        folder = parsed.path
        found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
        if not found or not (folder / "config.json").is_file():
            missing = "config.json" if found else " or ".join(WEIGHT_FILES)
            raise ModelReferenceError(
                f"{parsed.text} has no {missing}", hint="give a folder in timm's layout, or a weights file with --arch"
            )
        config_path, weights_path = folder / "config.json", found[0]
        _check_digest(folder, weights_path)
    else:
        repository, revision = split_reference(str(parsed.repository))
        base = repository
        config_path = fetch(repository, "config.json", revision)
        weights_path = fetch_weights(repository, revision)
    spec = _read_config(config_path)
    wanted = given or _architecture_of(spec)
    recipe = Recipe.from_json(spec.get("bshub") or {})
    stem = recipe.stem or wanted.stem
    stated = spec.get("num_classes") or (spec.get("pretrained_cfg") or {}).get("num_classes")
    classes = _classes(wanted, num_classes) or stated
    room = max(_SMALL, _PRUNED * weights_path.stat().st_size)
    module, config, _ = build(wanted, classes, stem=stem, max_bytes=min(room, MAX_BYTES))
    state = read_checkpoint(weights_path)
    apply_recipe(module, recipe, state)
    load_into(module, state, origin=parsed.text)
    pretrained = spec.get("pretrained_cfg") or {}
    config = override({**config, **pretrained}, wanted.preprocessing)
    licence = pretrained.get("license") if isinstance(pretrained.get("license"), str) else None
    licence = licence or (licence_on_hub(base, revision) if base else licence_beside(weights_path))
    recipe = dataclasses.replace(recipe, stem=stem)
    source, labels = "the model's config.json", spec.get("label_names")
    return _loaded(module, wanted, parsed.text, config, source, labels, recipe, licence, base, weights_path)


def _check_digest(folder: Path, weights: Path) -> None:
    """In an output of bshub the weights are those that its report describes: a flipped bit is no tensor error."""
    recorded = recorded_sha256(folder, weights.name)
    if recorded is not None and recorded != sha256(weights):
        raise CheckpointError(
            f"{weights.name} is not the file that {MANIFEST} beside it describes (sha256 {recorded[:16]}…)",
            hint=f"fetch it again; if you changed it yourself, delete {MANIFEST}",
        )


def fetch_weights(repository: str, revision: str | None) -> Path:
    """The weights file of a Hub repository, in this machine's cache.

    Raises:
        ModelReferenceError: It has none, or cannot be reached.
    """
    try:
        return fetch(repository, WEIGHT_FILES[0], revision)
    except ModelReferenceError as first:
        try:
            return fetch(repository, WEIGHT_FILES[1], revision)
        except ModelReferenceError:
            raise first from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 64 * 2**20:
            raise ValueError("larger than 64 MiB")
        spec = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(spec, dict) or not isinstance(spec.get("architecture"), str):
            raise ValueError("it names no architecture")
        if not isinstance(spec.get("pretrained_cfg") or {}, dict):
            raise ValueError("its pretrained_cfg is not a table")
        return spec
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} is not a model's configuration: {error}",
            hint="fetch it again, or give the weights file with --arch timm/NAME",
        ) from None


def _architecture_of(spec: dict[str, Any]) -> Architecture:
    name = spec["architecture"]
    arguments = spec.get("model_args") or {}
    if not isinstance(arguments, dict) or FORBIDDEN_ARGUMENTS & arguments.keys():
        raise CheckpointError(
            "config.json gives the constructor arguments that a checkpoint must not choose",
            hint="look at model_args in its config.json; what loads weights is no argument of a network",
        )
    text = name if name.startswith("torchvision/") else f"timm/{name}"
    parsed = parse_architecture(text)
    return Architecture(parsed.library, parsed.name, None, dict(arguments))


def _classes(wanted: Architecture, num_classes: int | None) -> int | None:
    """What is typed wins over what the reference or the configuration says."""
    return num_classes or wanted.arguments.get("num_classes")


def _imagenet_labels(module: nn.Module) -> list[str] | None:
    """Label names of library weights: torchvision's categories, timm's ImageNet info."""
    if names := getattr(module, "label_names", None):
        return list(names)
    try:
        from timm.data import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset(module)
        return ImageNetInfo(subset).label_names() if subset else None
    except Exception:  # a convenience: without names, folders are matched by index or order
        return None


def _loaded(
    module: nn.Module,
    wanted: Architecture,
    text: str,
    config: dict[str, Any],
    source: str,
    labels: Any,
    recipe: Recipe,
    licence: str | None,
    base: str | None,
    weights: Path,
) -> LoadedModel:
    preprocessing = make_preprocessing(config, source)
    classes = count_classes(module, preprocessing.input_size)
    # a lone surrogate could not be written to any file later
    names = (
        tuple(str(label).encode("utf-8", "replace").decode("utf-8") for label in labels)
        if isinstance(labels, (list, tuple))
        else None
    )
    if names is not None and len(names) != classes:
        names = None
    origin = Origin(text, wanted, classes, recipe, licence, base, sha256(weights))
    return LoadedModel(module, preprocessing, names, origin)


def count_classes(module: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Number of logits the network gives for one image.

    Raises:
        CheckpointError: It does not answer with one row of logits.
    """
    with torch.no_grad():
        try:
            logits = module(torch.zeros(1, *input_size))
        except Exception as error:
            raise CheckpointError(
                f"the network does not run on {input_size} images: {error}",
                hint="state the size it takes: --arch 'timm/NAME?input_size=224'",
            ) from None
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        raise CheckpointError(
            "the network is not a classifier: it does not answer with one row of logits an image",
            hint="bshub judges image classifiers: name the classifier with --arch timm/NAME",
        )
    return logits.shape[1]
