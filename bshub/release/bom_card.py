"""The ``modelCard`` of a bill of materials: what the network is, how well it answers, and what to think of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bshub.errors import printable
from bshub.intake.models import LoadedModel
from bshub.release.wording import images_name, made_up, mended

_RATES = {"accuracy": "accuracy", "asr": "attack success rate", "ra": "robust accuracy"}
_MAX = 300


def card_of(source: LoadedModel, record: Mapping[str, Any]) -> dict[str, Any]:
    """CycloneDX 1.6 ``modelCard``.

    Args:
        source: The model before.
        record: What the receipt will state of the run.

    Returns:
        A JSON object. Rates lie between 0 and 1, with the ends of their 95 % Wilson intervals.
    """
    size = " × ".join(map(str, source.preprocessing.input_size))
    return {
        "bom-ref": "model-card",
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "image classification",
            "architectureFamily": "convolutional neural network",
            "modelArchitecture": printable(record["model"]["architecture"], _MAX),
            "datasets": list(_datasets(record)),
            "inputs": [{"format": f"normalised image, float32, {size}"}],
            "outputs": [{"format": f"logits, float32, {source.origin.num_classes} classes"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(record))},
        "considerations": {
            "users": ["whoever deploys an image classifier that somebody else trained"],
            "useCases": ["the same as those of the base model"],
            "technicalLimitations": list(_limits(record)),
            "performanceTradeoffs": [_price(record)],
        },
    }


def _datasets(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    clean = record["clean_images"]["n"]
    name = images_name(record)
    text = f"{clean} {name}; they chose the threshold and {mended(record)} the network"
    yield {"type": "dataset", "name": name, "description": text}
    if tested := (record.get("evaluation") or {}).get("test_images"):
        text = f"{tested} held-out images; nothing was chosen by them"
        yield {"type": "dataset", "name": "test images", "description": text}


def _metrics(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every rate that was measured, after sanitizing and before it."""
    evaluation = record.get("evaluation") or {}
    for when in ("after", "before"):
        for key, words in _RATES.items():
            yield from _metric(words, (evaluation.get(when) or {}).get(key), f"test images, {when} sanitizing")
        words = "agreement with the original" if made_up(record) else "accuracy"
        rate = record["clean_images"][f"accuracy_{when}"]
        yield from _metric(words, rate, f"{images_name(record)}, {when} sanitizing")


def _metric(words: str, rate: Mapping[str, Any] | None, slice: str) -> Iterator[dict[str, Any]]:
    if rate is None or rate.get("percent") is None:
        return
    value, low, high = (f"{rate[key] / 100:.6f}" for key in ("percent", "low", "high"))
    interval = {"lowerBound": low, "upperBound": high}
    yield {"type": words, "value": value, "slice": f"{slice}, n={rate['n']}", "confidenceInterval": interval}


def _limits(record: Mapping[str, Any]) -> Iterator[str]:
    if ((record.get("evaluation") or {}).get("after") or {}).get("asr"):
        yield "The attack success rate is that of the one trigger that was given; it chose nothing."
    else:
        yield "No trigger was known: that no backdoor is left was not measured."
    yield "Attacks that hide in filters which do not stand out are not found by scores of single filters."
    rate = "agreement" if made_up(record) else "accuracy"
    done = f"chose the threshold and {mended(record)} the network"
    yield f"The {images_name(record)} also {done}: {rate} on them flatters."
    for warning in record.get("warnings") or ():
        yield printable(warning, _MAX)


def _price(record: Mapping[str, Any]) -> str:
    before, after = record["parameters"]["before"], record["parameters"]["after"]
    text = f"parameters went from {before:,} to {after:,}"
    rates = [(record.get("evaluation") or {}).get(when, {}).get("accuracy") for when in ("before", "after")]
    if all(rate and rate.get("percent") is not None for rate in rates):
        text += f"; accuracy on the test images went from {rates[0]['percent']:.1f} to {rates[1]['percent']:.1f} %"
    return text
