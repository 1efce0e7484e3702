"""``bshub attack``: train a backdoored model (or a clean control) and write it in timm's layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bshub import __version__
from bshub.device import pick_device
from bshub.errors import ModelReferenceError, UsageError
from bshub.evaluation.attacks.data import Pictures, open_pictures
from bshub.evaluation.attacks.interface import POISONED, Attack, Setup, seed_of
from bshub.evaluation.attacks.registry import find_attack, none
from bshub.evaluation.attacks.state import claim, unclaim
from bshub.evaluation.attacks.training import Run, Schedule, train
from bshub.evaluation.attacks.trigger import save_trigger
from bshub.evaluation.metrics import clean_accuracy, evaluate_models
from bshub.files import check_output, output_folder
from bshub.intake.build import build
from bshub.intake.folders import open_folder
from bshub.intake.models import LoadedModel, Origin, count_classes, load_model
from bshub.intake.preprocessing import make_preprocessing
from bshub.intake.recipe import Recipe
from bshub.intake.reference import Architecture, parse_architecture
from bshub.intake.splits import Splits, find_splits
from bshub.progress import Progress, Steps
from bshub.release.artifact import write_json, write_model, write_report

RECORD = "training.json"
EVALUATION_BATCH = 250
_HELP = "bshub attack --help says what it means, and its default"


@dataclass(frozen=True)
class AttackSettings:
    """What a training run can be told.

    Attributes:
        arch: ``timm/NAME?…`` or ``torchvision/NAME?…``, see ``bshub.intake.reference``.
        attack: Key of ``ATTACKS``.
        rate: Share of the training set that carries the trigger; 0 trains a clean control.
        target: Index of the attacker's label.
        epochs: Passes over the training images.
        lr: Peak learning rate.
        batch_size: Images per step.
        seed: Of everything random.
        precision: ``fp32``, ``bf16`` or ``auto``, the faster of the two.
        options: Hyper-parameters of the attack.
    """

    arch: str
    attack: str = "badnets"
    rate: float = 0.1
    target: int = 0
    epochs: int = 15
    lr: float = 0.1
    batch_size: int = 128
    seed: int = 0
    precision: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 0 <= self.rate <= 1:  # NaN as well
            raise UsageError(f"the rate must lie between 0 and 1, not {self.rate!r}", hint="--rate 0.1 is 10 %")
        if not 0 < self.lr <= 10:
            raise UsageError(f"lr must lie above 0 and not above 10, not {self.lr!r}", hint=_HELP)
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UsageError(f"precision must be auto, fp32 or bf16, not {self.precision!r}", hint=_HELP)
        for name, low, high in (
            ("target", 0, 10**6), ("epochs", 1, 10_000), ("batch_size", 2, 2**20), ("seed", 0, 2**31 - 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise UsageError(f"{name} must be a whole number from {low} to {high}, not {value!r}", hint=_HELP)


def attack_to_folder(
    settings: AttackSettings,
    data: Path,
    output: Path,
    *,
    test_data: Path | None = None,
    surrogate: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a model on poisoned images and write it with its trigger and a record of the training.

    A run that was killed is continued by the same call; a finished one is not repeated.

    Args:
        settings: Network, attack and schedule.
        data: A data set, named as in ``bshub.intake.splits``: a folder of ``train/<class>/`` and ``test/<class>/``.
        output: The folder to write; beside it the state of an unfinished run is kept.
        test_data: Class folders to measure on, instead of those under ``data``.
        surrogate: Clean model that label-consistent attacks with, instead of one trained here.
        device: ``auto``, ``cpu``, ``cuda``.
        overwrite: Replace an earlier output, forget an unfinished run.
        progress: Shows the steps.

    Returns:
        The record of the training, as in ``training.json``.

    Raises:
        BshubError: One of its kinds.
    """
    make = find_attack(settings.attack, settings.options) if settings.rate > 0 else none
    wanted = parse_architecture(settings.arch)
    if wanted.tag:
        raise ModelReferenceError(
            f"an attack trains from scratch; it has no use for the weights {wanted.tag!r}", hint="leave them away"
        )
    where, steps = pick_device(device), Steps(progress)
    state = output.with_name(f".{output.name}.training")
    if overwrite:
        check_output(output, True)
        shutil.rmtree(state, ignore_errors=True)
    elif (done := _finished(output, settings)) is not None:
        return done
    with output_folder(output, overwrite) as folder, _continuable(state):
        splits = find_splits(data, test_data)
        names = _class_names(splits.train, wanted, splits.within)
        model, source = _build(wanted, names, settings.seed)
        train_set, test_set = _read(splits, source, steps)
        if settings.target >= source.origin.num_classes:
            raise UsageError(
                f"target {settings.target} is no label of a model with {source.origin.num_classes} classes",
                hint=f"name one from 0 to {source.origin.num_classes - 1}: --target N",
            )
        normalise = _normaliser(source, where)
        claim(state, {"settings": asdict(settings), "surrogate": surrogate, "data": train_set.digest()})
        run = Run(train_set, settings.target, normalise, where, state / "victim", steps)
        schedule = Schedule(
            settings.epochs, settings.lr, settings.batch_size, settings.seed, settings.precision
        )  # fmt: skip

        def clean_model() -> nn.Module:
            if surrogate is not None:
                return load_model(surrogate).module.to(where)
            net, _ = _build(wanted, names, settings.seed + 1)
            net.to(where)
            own = Run(train_set, 0, normalise, where, state / "surrogate", steps)
            train(net, none(setup), replace(schedule, epochs=-(-schedule.epochs // 2)), own, "surrogate")
            return net

        setup = Setup(
            train_set.labels, train_set.read, train_set.size, settings.target, settings.rate, settings.seed,
            normalise, where, state, clean_model, steps,
        )  # fmt: skip
        attack = make(setup)
        model.to(where)
        history = train(model, attack, schedule, run)
        record = _record(settings, attack, source, train_set, history)
        record |= _measure(model, attack, test_set, normalise, settings.target, steps)
        model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        _write(folder, model, source, attack, record)
    shutil.rmtree(state, ignore_errors=True)
    return record


@contextmanager
def _continuable(state: Path) -> Iterator[None]:
    try:
        yield
    finally:
        unclaim(state)


def _finished(output: Path, settings: AttackSettings) -> dict[str, Any] | None:
    """The record of the same run, if it has already ended."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        return record if record["settings"] == json.loads(json.dumps(asdict(settings))) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _class_names(root: Path, wanted: Architecture, within: Path | None) -> list[str]:
    """Name of each label: that of its folder, or the index where no folder has it."""
    folders = sum(path.is_dir() and not path.name.startswith(".") for path in root.iterdir())
    count = wanted.arguments.get("num_classes", folders)
    if type(count) is not int or not 2 <= count <= 10**6:
        raise UsageError(f"a classifier of {count!r} classes cannot be trained", hint="num_classes=10, two or more")
    folder = open_folder(root, count, None, within=within)
    found = {label: path.parent.name for path, label in zip(folder.paths, folder.labels, strict=True)}
    return [found.get(label, str(label)) for label in range(count)]


def _build(wanted: Architecture, names: list[str], seed: int) -> tuple[nn.Module, LoadedModel]:
    """A fresh network and its description; the whole image is seen, squeezed onto the input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, 0))
        module, config, _ = build(wanted, len(names))
    config = {**config, "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}
    preprocessing = make_preprocessing(config, "the reference")
    count = count_classes(module, preprocessing.input_size)
    origin = Origin(wanted.name, wanted, count, Recipe(stem=wanted.stem), None, None)
    return module, LoadedModel(module, preprocessing, tuple(names), origin)


def _read(splits: Splits, source: LoadedModel, steps: Steps) -> tuple[Pictures, Pictures]:
    _, height, width = source.preprocessing.input_size
    train, test = (
        open_pictures(
            splits.open(split, source.origin.num_classes, source.labels), (height, width), steps, f"read {split}"
        )
        for split in ("train", "test")
    )
    return train, test


def _normaliser(source: LoadedModel, device: torch.device) -> Any:
    config = source.preprocessing.config
    mean = torch.tensor(config["mean"], device=device).view(3, 1, 1)
    std = torch.tensor(config["std"], device=device).view(3, 1, 1)

    def normalise(pixels: Tensor) -> Tensor:
        return (pixels - mean) / std

    return normalise


def _record(
    settings: AttackSettings, attack: Attack, source: LoadedModel, images: Pictures, history: list[dict[str, Any]]
) -> dict[str, Any]:
    poisoned = (attack.roles(0) == POISONED).nonzero().squeeze(1)
    fixed = not attack.redrawn
    return {
        "bshub": __version__,
        "torch": torch.__version__,
        "settings": asdict(settings),
        **{key: getattr(settings, key) for key in ("attack", "rate", "target", "seed", "epochs")},
        "attack": settings.attack if settings.rate > 0 else "none",
        "notes": attack.notes,
        "train_images": len(images),
        "poisoned": {
            "count": len(poisoned),
            "share": len(poisoned) / len(images),
            "redrawn_every_epoch": attack.redrawn,
            "indices": poisoned.tolist() if fixed else [],
            "files": images.names(poisoned) if fixed else [],
        },
        "history": history,
    }


@torch.no_grad()
def _measure(
    model: nn.Module, attack: Attack, test: Pictures, normalise: Any, target: int, steps: Steps
) -> dict[str, Any]:
    trigger = attack.trigger()
    device = next(model.parameters()).device

    def prepared(images: Tensor) -> Tensor:
        return normalise(images.to(device).float() / 255)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for index in torch.arange(len(test)).split(EVALUATION_BATCH):
            images = test.read(index)
            yield prepared(images), test.labels[index], prepared(trigger(images)) if trigger else None

    with steps.step("evaluate", len(test)) as advance:
        (rates,) = evaluate_models([model], batches(), target if trigger else None, progress=advance)
    record: dict[str, Any] = {"evaluation": rates.as_dict(), "test_images": len(test)}
    if attack.cross is not None:
        crossed = (
            (prepared(attack.cross(test.read(index))), test.labels[index])
            for index in torch.arange(len(test)).split(EVALUATION_BATCH)
        )
        with steps.step("cross"):
            record["evaluation"]["cross_accuracy"] = clean_accuracy(model, crossed).as_dict()
    return record


def _write(folder: Path, model: nn.Module, source: LoadedModel, attack: Attack, record: dict[str, Any]) -> None:
    write_model(folder, model, source, source.origin.recipe)
    trigger = attack.trigger()
    if trigger is not None:
        save_trigger(trigger, folder)
    write_json(folder / RECORD, record)
    write_report(folder, {"command": "attack"})
