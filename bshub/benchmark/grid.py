"""Models × methods × samples per class × seeds → one row each.

Every method gets the same clean images, drawn from the training split among those that were not poisoned (of a class
that was poisoned to the last image, from test images that are not counted); ACC, ASR, RA are counted on the test split,
which nothing else looks at. No method sees the trigger.
"""

from __future__ import annotations

import gc
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bshub import __version__
from bshub.benchmark.cost import bare_step, costs
from bshub.benchmark.draws import batches, draw
from bshub.benchmark.methods import Batches, parse_method
from bshub.benchmark.rows import Cell, Rows, on_weights
from bshub.clean import CleanImages
from bshub.device import pick_device
from bshub.errors import BshubError, UsageError
from bshub.evaluation.attacks.trigger import Trigger, load_trigger, resize_to
from bshub.evaluation.metrics import Evaluation, accuracy_lost, der, evaluate_models
from bshub.intake.folders import ClassFolder
from bshub.intake.models import LoadedModel, load_model
from bshub.intake.splits import find_splits
from bshub.progress import Steps
from bshub.stand_ins import StandIns

BATCH = 250
UNSEEN = 4  # images per class handed to methods that look at none; the bare step is taken over them


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        models: Folders that ``bshub attack`` wrote.
        data: A data set, named as in ``bshub.intake.splits``.
        methods: As in :func:`bshub.benchmark.methods.parse_method`.
        per_class: Numbers of clean images per class; with 0 only our default is run, on made-up images.
        seeds: Of draws and methods.
        test_images: How many test images, drawn once for all; None: all.
        effort: Share of the baselines' published iterations.
        device: Where.
    """

    models: tuple[Path, ...]
    data: Path
    methods: tuple[str, ...]
    per_class: tuple[int, ...] = (10,)
    seeds: tuple[int, ...] = (0,)
    test_images: int | None = None
    effort: float = 1.0
    device: str = "auto"


@dataclass(frozen=True)
class Victim:
    """A model of the grid with everything that is measured on it.

    Attributes:
        name: Of its folder.
        source: The model.
        record: ``training.json``.
        trigger: None for a clean control.
        weights: Start of the sha256 of the weights.
    """

    name: str
    source: LoadedModel
    record: dict[str, Any]
    trigger: Trigger | None
    weights: str


def run_grid(grid: Grid, rows: Rows, steps: Steps) -> None:
    """Measure the missing rows.

    Args:
        grid: What is asked for.
        rows: Where rows go; those it holds are not measured again.
        steps: Where the work is shown, a step a model.

    Raises:
        UsageError: A method, model or data folder cannot be used.
    """
    for method in grid.methods:
        parse_method(method)
    splits = find_splits(grid.data)
    for folder in grid.models:
        victim = open_victim(folder)
        test, train = (
            splits.open(split, victim.source.origin.num_classes, victim.source.labels) for split in ("test", "train")
        )
        chosen = chosen_tests(test, grid.test_images)
        cells = [cell for cell in cells_of(grid, victim, len(chosen)) if cell not in rows]
        if not cells:
            continue
        with steps.step(victim.name, len(cells)) as advance:
            images = load_tests(test, chosen, victim)
            (before,) = _evaluate([victim.source.module], images, victim, grid.device)
            reserve = unseen(test, chosen)
            for cell in cells:
                rows.add(cell, measure_cell(cell, victim, train, reserve, images, before, grid.device))
                advance(1)
                gc.collect()


def open_victim(folder: Path) -> Victim:
    """Read a folder of ``bshub attack``.

    Raises:
        UsageError: It is none.
    """
    try:
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} is no folder of `bshub attack`: {error}", hint="make one with bshub attack"
        ) from None
    path = folder / "trigger.json"
    trigger = load_trigger(path) if path.exists() else None
    return Victim(folder.name, load_model(str(folder)), record, trigger, digest)


def cells_of(grid: Grid, victim: Victim, tests: int) -> list[Cell]:
    """The grid's places for one model; a method without images has one for each seed."""
    cells = []
    for seed in grid.seeds:
        for method in grid.methods:
            unaided = parse_method(method).name == "bshub"  # may go without images, where none are asked for
            counts = (0,) if on_weights(method) else [count for count in grid.per_class if count or unaided]
            for per_class in counts:
                cells.append(Cell(victim.name, victim.weights, method, per_class, seed, grid.effort, tests))
    return list(dict.fromkeys(cells))


def chosen_tests(folder: ClassFolder, count: int | None) -> list[int]:
    """Indices of the test images, the same for every model and method."""
    everything = list(range(len(folder)))
    return everything if count is None or count >= len(folder) else sorted(random.Random(0).sample(everything, count))


def unseen(folder: ClassFolder, chosen: list[int]) -> list[tuple[Path, int]]:
    """The test images that nothing is measured on, with their labels."""
    measured = set(chosen)
    return [(folder.paths[i], folder.labels[i]) for i in range(len(folder)) if i not in measured]


def load_tests(folder: ClassFolder, chosen: list[int], victim: Victim) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalised test images ``[n, c, h, w]``, labels ``[n]``, and the images with the trigger."""
    from bshub.intake.images import read_image

    prepare = victim.source.preprocessing
    clean, stamped = [], []
    for index in chosen:
        image = read_image(folder.paths[index])
        clean.append(prepare(image))
        if victim.trigger is not None:
            canvas = resize_to(image, victim.trigger.size).unsqueeze(0)
            stamped.append(prepare(victim.trigger(canvas)[0]))
    labels = torch.tensor([folder.labels[index] for index in chosen])
    return torch.stack(clean), labels, torch.stack(stamped) if stamped else None


def _evaluate(
    models: list[nn.Module], tests: tuple[Tensor, Tensor, Tensor | None], victim: Victim, device: str
) -> list[Evaluation]:
    images, labels, stamped = tests
    parts = range(0, len(labels), BATCH)
    stream = (
        (images[i : i + BATCH], labels[i : i + BATCH], stamped[i : i + BATCH] if stamped is not None else None)
        for i in parts
    )
    place = pick_device(device)
    for model in models:
        model.to(place)
    result = evaluate_models(models, stream, victim.trigger.target if victim.trigger else None)
    for model in models:
        model.cpu()
    return result


def measure_cell(
    cell: Cell,
    victim: Victim,
    train: ClassFolder,
    reserve: list[tuple[Path, int]],
    tests: tuple[Tensor, Tensor, Tensor | None],
    before: Evaluation,
    device: str,
) -> dict[str, Any]:
    """One row: rates before and after, cost, and what the method said; a method that fails says why."""
    method = parse_method(cell.method)
    prepare = victim.source.preprocessing
    given: Batches | StandIns
    if cell.per_class or on_weights(cell.method):
        avoid = set(victim.record.get("poisoned", {}).get("files", []))
        given = clean = batches(draw(train, cell.per_class or UNSEEN, cell.seed, avoid, reserve), prepare, 128)
    else:
        given = StandIns.like(prepare, seed=cell.seed)
        clean = list(given.answered_by(victim.source.module))
    row: dict[str, Any] = {
        "bshub": __version__,
        "attack": victim.record["attack"],
        "rate": victim.record["rate"],
        "arch": victim.record["settings"]["arch"],
        "clean_images": sum(len(labels) for _, labels in clean) if cell.per_class else 0,
        "before": before.as_dict(),
    }
    try:
        held = CleanImages(clean, pick_device("cpu"))
        row["bare_step_seconds"] = round(bare_step(victim.source.module, held, 128), 4)
        with costs() as cost:
            defended, notes = method.run(victim.source.module, given, cell.seed, cell.effort, device)
    except BshubError as error:
        return {**row, "failed": error.message}
    (after,) = _evaluate([defended], tests, victim, device)
    worth = der(before, after)
    return {
        **row,
        "after": after.as_dict(),
        "accuracy_lost": accuracy_lost(before, after).as_dict(),
        "der": None if worth is None else round(worth, 4),
        "seconds": round(cost.seconds, 3),
        "ratio": round(cost.seconds / row["bare_step_seconds"], 1),
        "megabytes": None if cost.megabytes is None else round(cost.megabytes, 1),
        "cuda_megabytes": cost.cuda_megabytes,
        "threads": torch.get_num_threads(),
        "notes": notes,
    }
