"""The model card: what was done to which model and why, measured how, and how to load the result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from torch import nn

from bshub.errors import printable
from bshub.intake.models import LoadedModel
from bshub.intake.recipe import Recipe
from bshub.release.card_metadata import front_matter
from bshub.release.loaders import loader_text, onnx_text
from bshub.release.wording import hardened, images_name, mended, rate_name, repair_passes
from bshub.repair.lesson import STRONG
from bshub.surgery.proof import Proof

__all__ = [
    "Extras",
    "Plot",
    "dense_card",
    "escape",
    "loader_text",
    "lost_text",
    "model_card",
    "rate_text",
    "shown_reference",
]

LAYERS_SHOWN = 8
SCORE_WORDS = {
    "tac": "how much its map changes under an inverted trigger, a small change of the image that leads to one class",
    "lipschitz": "how strongly the filter and its batch norm can amplify what they see",
    "clp": "how strongly the filter and its batch norm can amplify what they see",
    "bss": "how strongly it can amplify, how little it moves with the others, and how quiet it is on clean images",
    "lone": "how strongly it can amplify and how little it moves with the others of its layer",
    "dormant": "how strongly it can amplify, against how quiet it is on clean images",
    "bn-shift": "how far its values on clean images lie from those it saw in training",
}
REPAIR_WORDS = {
    "distil": "learning from the answers of the network before pruning",
    "finetune": "plain fine-tuning on the labels",
}


@dataclass(frozen=True)
class Plot:
    """A picture for the card: its path in the folder, a text for those who cannot see it, and how to read it."""

    path: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Extras:
    """What else lies in the folder.

    Attributes:
        plots: Pictures.
        dense: Whether there is a dense copy.
        page: Whether there is a ``report.html``.
        repository: Where it will be published, if that is known.
    """

    plots: Sequence[Plot] = ()
    dense: bool = False
    page: bool = False
    repository: str | None = None


def model_card(
    source: LoadedModel,
    model: nn.Module,
    recipe: Recipe,
    report: dict[str, Any],
    command: str,
    extras: Extras | None = None,
) -> str:
    """The text of the artifact's ``README.md``.

    Args:
        source: The model before.
        model: The model after.
        recipe: Its recipe.
        report: Of the run.
        command: The command line that made it.
        extras: What else lies in the folder.

    Returns:
        YAML front matter and Markdown; everything foreign is escaped.
    """
    extras = extras or Extras()
    origin, threshold = source.origin, report["diagnosis"]["threshold"]
    flagged = sorted(report["diagnosis"]["flagged"].items(), key=lambda item: -len(item[1]))
    evaluation = report.get("evaluation") or {}
    text = _template("card.md.jinja").render(
        name=escape(_name(source)),
        reference=re.sub(r"[^\w./:@?&=,+ -]", "_", shown_reference(origin.reference))[:300],
        report={**report, "warnings": [escape(warning) for warning in report["warnings"]]},
        counts=report["counts"],
        rows=_rows(report),
        plots=extras.plots,
        score_words=SCORE_WORDS.get(report["diagnosis"]["score"], "see bshub's documentation"),
        mu=threshold["mu"],
        uses=["chose the threshold"] * bool(threshold.get("curve"))
        + ["chose the spare filters"] * bool(report.get("shrink"))
        + [f"{mended(report)} the network"] * report["repaired"],
        shrink=report.get("shrink"),
        shrink_reason=escape((report.get("shrink") or {}).get("reason", "")),
        threshold_reason=escape(threshold["reason"]),
        shifted=escape((report["diagnosis"].get("shifted") or {}).get("reason", "")),
        inversion=escape((report["diagnosis"].get("inversion") or {}).get("reason", "")),
        unlearned=report.get("trigger_success"),
        hardened=hardened(report),
        strongest_wave=STRONG,
        passes=repair_passes(report),
        layers=[(escape(name), len(filters)) for name, filters in flagged[:LAYERS_SHOWN]],
        more_layers=len(flagged[LAYERS_SHOWN:]),
        more_filters=sum(len(filters) for _, filters in flagged[LAYERS_SHOWN:]),
        repair_words=REPAIR_WORDS.get(report["settings"]["repair"], escape(report["settings"]["repair"])),
        images=images_name(report),
        asr=(evaluation.get("after") or {}).get("asr"),
        licence=origin.licence,
        library=origin.architecture.library,
        repository=extras.repository,
        loader=loader_text(
            origin.architecture.library,
            recipe.stem,
            bool(recipe.kept.keys() - model.state_dict().keys()),
            bool(recipe.refilled),
        ),
        onnx=report.get("onnx"),
        onnx_loader=onnx_text(source.preprocessing.config),
        dense=extras.dense,
        page=extras.page,
        preprocessing=source.preprocessing.config,
        size=", ".join(map(str, source.preprocessing.input_size)),
        command=printable(command, 2000).replace("```", ""),
        versions="Made with " + ", ".join(f"{n} {v}" for n, v in report.get("versions", {}).items()),
    )
    return f"---\n{front_matter(source, _name(source), report)}\n---\n\n{text}"


def dense_card(source: LoadedModel, proof: Proof) -> str:
    """The card of a dense copy."""
    text = _template("dense_card.md.jinja").render(
        name=escape(_name(source)), library=source.origin.architecture.library, proof=proof
    )
    return f"---\n{front_matter(source, _name(source), {}, tags=['compatibility-copy'])}\n---\n\n{text}"


def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(
        loader=loader, autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    ).get_template(name)


def _name(source: LoadedModel) -> str:
    return source.origin.base_model or source.origin.architecture.name


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    evaluation = report.get("evaluation") or {}
    for key, title in (("accuracy", "clean accuracy"), ("asr", "attack success rate"), ("ra", "robust accuracy")):
        before, after = (evaluation.get(when, {}).get(key) for when in ("before", "after"))
        if before and after:
            rows.append((title, rate_text(before), rate_text(after)))
    if "accuracy_lost" in evaluation:
        rows.append(("clean accuracy lost, points", "–", lost_text(evaluation["accuracy_lost"])))
    clean = report["clean_images"]
    rows.append((rate_name(report), rate_text(clean["accuracy_before"]), rate_text(clean["accuracy_after"])))
    for key, title in (("parameters", "parameters"), ("macs", "multiply-accumulates per image")):
        rows.append((title, f"{report[key]['before']:,}", f"{report[key]['after']:,}"))
    return rows


def shown_reference(reference: str) -> str:
    """A reference for a public page: of a local path only the last part, which says nothing of a machine."""
    return Path(reference).name if Path(reference).exists() else reference


def rate_text(rate: dict[str, Any]) -> str:
    """``83.4 [80.9, 85.6] n=1000`` from a report's rate."""
    return f"{rate['percent']:.1f} [{rate['low']:.1f}, {rate['high']:.1f}] n={rate['n']}"


def lost_text(lost: dict[str, Any]) -> str:
    """``0.9 [0.1, 1.7] n=1000`` from a report's loss of accuracy; negative where it rose."""
    return f"{lost['points']:.1f} [{lost['low']:.1f}, {lost['high']:.1f}] n={lost['n']}"


def escape(text: object) -> str:
    """Foreign text for Markdown: control characters and everything with a meaning in Markdown or HTML escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~])", r"\\\1", printable(text, 500))
