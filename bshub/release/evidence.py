"""What a report page shows of a run: filters with their fate, answers before and after, images that excite a filter."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bshub.clean import CleanImages
from bshub.copying import named_tensors
from bshub.graph.pairs import ConvBN, Pairing
from bshub.graph.trace import in_mode
from bshub.intake.preprocessing import Preprocessing
from bshub.scoring.plan import RemovalPlan
from bshub.scoring.selection import Threshold
from bshub.scoring.statistics import PairStatistics, measure
from bshub.scoring.stream import activation_of, affine_of

STATISTICS = ("spectral", "saliency", "activation", "correlation", "bn_shift")
FATES = ("kept", "removed", "silenced", "left with them", "spare")  # the last only where a run was to shrink
MEASURED_IMAGES = 128
EXCITED_FILTERS, EXCITED_IMAGES = 6, 4
THUMBNAIL = 96  # pixels of the longer side


@dataclass(frozen=True)
class Layer:
    """One convolution with a batch norm.

    Attributes:
        name: Qualified name.
        index: Its scored filters, ``[n]``.
        scores: In deviations from the layer's mean, ``[n]``.
        fates: One of ``FATES`` each.
        statistics: Name → values ``[n]``.
    """

    name: str
    index: list[int]
    scores: list[float]
    fates: list[str]
    statistics: dict[str, list[float]]


@dataclass(frozen=True)
class Thumbnail:
    """A clean image as a ``data:`` address, with the place (shares of width and height) of the strongest response."""

    picture: str
    left: float
    top: float
    label: str


@dataclass(frozen=True)
class Excited:
    """A filter that left, and the clean images it answers to most."""

    layer: str
    filter: int
    score: float
    fate: str
    images: list[Thumbnail]


@dataclass(frozen=True)
class Evidence:
    """Everything the page draws.

    Attributes:
        layers: In execution order.
        threshold: μ and its curve.
        labels: Of the clean images, ``[n]``.
        before: The original's answers to them, ``[n]``.
        after: The sanitized network's, ``[n]``.
        excited: The most suspicious filters that left; empty where no pictures are wanted.
    """

    layers: list[Layer]
    threshold: Threshold
    labels: list[int]
    before: list[int]
    after: list[int]
    excited: list[Excited]


def gather(
    original: nn.Module,
    small: nn.Module,
    pairing: Pairing,
    scores: Mapping[str, Tensor],
    threshold: Threshold,
    plan: RemovalPlan,
    clean: CleanImages,
    preprocessing: Preprocessing,
    names: Sequence[str],
    *,
    batch_size: int = 32,
    pictures: bool = True,
) -> Evidence:
    """Collect the evidence; neither network is changed.

    Args:
        original: The network before, on the device of the clean images.
        small: The network after, on the same device.
        pairing: Conv-BN pairs of the original.
        scores: Convolution → ``[out_channels]`` deviations.
        threshold: Of the run.
        plan: What was really done.
        clean: The clean images that were used.
        preprocessing: Of the model, to turn tensors back into pictures.
        names: Name of each class.
        batch_size: Images per batch.
        pictures: Whether clean images are shown.

    Returns:
        The evidence.
    """
    batches = clean.batches(batch_size)
    few, seen = [], 0
    for images, labels in batches:
        few.append((images, labels))
        seen += len(images)
        if seen >= MEASURED_IMAGES:
            break
    statistics = measure(original, pairing, few)
    chosen = _chosen(scores, plan) if pictures else []
    pairs = {pair.name: pair for pair in pairing.pairs}
    with _watch(original, [pairs[name] for name in dict.fromkeys(name for name, _, _ in chosen)]) as peaks:
        before = _answers(original, batches)
    return Evidence(
        layers=[_layer(pair, scores[pair.name], statistics[pair.name], plan) for pair in pairing.pairs],
        threshold=threshold,
        labels=clean.labels.tolist(),
        before=before,
        after=_answers(small, batches),
        excited=[
            _excited(name, index, score, plan, peaks[name], clean, preprocessing, names)
            for name, index, score in chosen
        ],
    )


def _layer(pair: ConvBN, scores: Tensor, statistics: PairStatistics, plan: RemovalPlan) -> Layer:
    index = torch.from_numpy(pair.paired).nonzero().flatten().tolist()
    found = {name: getattr(statistics, name) for name in STATISTICS}
    return Layer(
        pair.name,
        index,
        [float(scores[i]) for i in index],
        [_fate(plan, pair.name, i) for i in index],
        {name: values[index].tolist() for name, values in found.items() if values is not None},
    )


def _fate(plan: RemovalPlan, layer: str, index: int) -> str:
    places = {"removed": plan.removed, "silenced": plan.silenced, "left with them": plan.followers, "spare": plan.spare}
    return next((fate for fate, place in places.items() if index in place.get(layer, ())), "kept")


def _chosen(scores: Mapping[str, Tensor], plan: RemovalPlan) -> list[tuple[str, int, float]]:
    """The most suspicious filters that left: (layer, filter, score)."""
    gone = [
        (name, index, float(scores[name][index]))
        for place in (plan.removed, plan.silenced)
        for name, filters in place.items()
        if name in scores
        for index in filters
    ]
    return sorted(gone, key=lambda item: -item[2])[:EXCITED_FILTERS]


def _answers(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    with torch.no_grad(), in_mode(model, False):
        return [answer for images, _ in batches for answer in model(images).argmax(1).tolist()]


@contextmanager
def _watch(model: nn.Module, pairs: Sequence[ConvBN]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Layer → per batch the largest activation of each filter ``(n, out)`` and its place ``(n, out, 2)``, 0 to 1."""
    named = named_tensors(model)
    peaks: dict[str, list[tuple[Tensor, Tensor]]] = {pair.name: [] for pair in pairs}

    def see(pair: ConvBN) -> Any:
        affine, act = affine_of(pair, named), activation_of(pair)

        def hook(module: nn.Module, args: Any, z: Tensor) -> None:
            if z.ndim != 4:
                return
            a = act(z.detach() * affine.scale.view(-1, 1, 1) + affine.shift.view(-1, 1, 1))  # (n, out, h, w)
            values, at = a.flatten(2).max(2)
            width, height = a.shape[3], a.shape[2]
            place = torch.stack([(at % width + 0.5) / width, (at // width + 0.5) / height], -1)
            peaks[pair.name].append((values.cpu(), place.cpu()))

        return hook

    handles = [model.get_submodule(pair.name).register_forward_hook(see(pair)) for pair in pairs]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


def _excited(
    layer: str,
    index: int,
    score: float,
    plan: RemovalPlan,
    peaks: list[tuple[Tensor, Tensor]],
    clean: CleanImages,
    preprocessing: Preprocessing,
    names: Sequence[str],
) -> Excited:
    shown = []
    if peaks:
        runs = sum(len(values) for values, _ in peaks) // len(clean.images)  # of a module that is used several times
        peaks = peaks[:: max(runs, 1)]
        values, places = (torch.cat(parts)[:, index] for parts in zip(*peaks, strict=True))
        for k in values.argsort(descending=True, stable=True)[:EXCITED_IMAGES].tolist():
            left, top = places[k].tolist()
            shown.append(Thumbnail(_picture(clean.images[k], preprocessing), left, top, names[int(clean.labels[k])]))
    return Excited(layer, index, score, _fate(plan, layer, index), shown)


def _picture(image: Tensor, preprocessing: Preprocessing) -> str:
    """Normalised ``(3, h, w)`` → a small JPEG as a ``data:`` address."""
    from torchvision.transforms.functional import to_pil_image

    mean, std = (torch.tensor(preprocessing.config[key]).view(3, 1, 1) for key in ("mean", "std"))
    picture = to_pil_image((image.cpu() * std + mean).clamp(0, 1))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
