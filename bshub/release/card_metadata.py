"""The front matter of a model card: what the Hub reads of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from bshub.intake.models import LoadedModel
from bshub.release.wording import made_up

# The names that the Hub knows; another licence is written as `other` with its own name beside it.
LICENCES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    gfdl gpl gpl-2.0 gpl-3.0 intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl
    odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """.split()  # noqa: SIM905
)
_RATES = {
    "accuracy": ("accuracy", "accuracy"),
    "asr": ("attack_success_rate", "attack success rate"),
    "ra": ("robust_accuracy", "robust accuracy"),
}
_IMAGES = {"held-out": "held-out images", "clean": "the clean images that sanitizing used"}
_SIZES = {"parameters": "parameters", "macs": "multiply-accumulates for one image"}


def front_matter(source: LoadedModel, name: str, report: dict[str, Any], tags: Sequence[str] = ()) -> str:
    """YAML without its fences.

    Args:
        source: Licence, base model and library.
        name: Of the model.
        report: Of the run; its rates and sizes become the ``model-index``. Empty: there is none.
        tags: More of them.

    Returns:
        Text that the Hub's validation accepts.
    """
    results = _results(report) if report else []
    extra: dict[str, Any] = {}
    licence = source.origin.licence
    if licence and licence.lower() in LICENCES:
        extra["license"] = licence.lower()
    elif licence:
        extra.update(license="other", license_name=licence)
    if source.origin.base_model:
        extra.update(base_model=source.origin.base_model, base_model_relation="finetune")
    return ModelCardData(
        library_name=source.origin.architecture.library,
        pipeline_tag="image-classification",
        tags=["bshub", "backdoor-sanitized", *["pruned"] * _lost_filters(report), *tags],
        model_name=name if results else None,
        eval_results=results or None,
        **extra,
    ).to_yaml()


def _lost_filters(report: dict[str, Any]) -> bool:
    """Whether any filter left; without a report that is not known to be otherwise."""
    return not report or any(report["counts"].get(name) for name in ("removed", "spare"))


def _results(report: dict[str, Any]) -> list[EvalResult]:
    """Rates on each set of images and sizes, after and before.

    A rate is a value between 0 and 1 with the number of images and the ends of its interval.
    """
    evaluation, clean = report.get("evaluation") or {}, report["clean_images"]
    # where the labels are the model's own answers, accuracy would be agreement with itself
    own = report["model"].get("unlabelled", False) or made_up(report)
    found = []
    for when in ("after", "before"):
        rates = [("held-out", key, (evaluation.get(when) or {}).get(key)) for key in _RATES]
        rates.append(("clean", "accuracy", None if own else clean[f"accuracy_{when}"]))
        for images, key, rate in rates:
            if rate is not None and rate["percent"] is not None:
                kind, words = _RATES[key]
                interval = [round(rate["low"] / 100, 6), round(rate["high"] / 100, 6)]
                facts = {"n": rate["n"], "interval": interval, "method": "Wilson, 95 %"}
                found.append(
                    _result(images, kind, f"{words} {when} sanitizing", round(rate["percent"] / 100, 6), facts)
                )
    for when in ("after", "before"):
        for key, words in _SIZES.items():
            found.append(_result("held-out" if evaluation else "clean", key, f"{words} {when}", report[key][when]))
    return found


def _result(images: str, kind: str, name: str, value: float, facts: dict[str, Any] | None = None) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type="imagefolder",
        dataset_name=_IMAGES[images],
        dataset_split=images,  # results of one split are one entry, whatever the name
        metric_type=kind,
        metric_name=name,
        metric_value=value,
        metric_args=facts,
    )
