"""``report.html``: one page that needs nothing but a browser, and pictures of two of its charts for the card.

The charts are Vega-Lite, drawn by the copy of Vega that lies in the page; the page's own policy forbids every request
and every script but that one, so that nothing foreign (a class name, a layer name) can do more than be read.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup, escape

from bshub.errors import printable
from bshub.release.card import Plot, rate_text, shown_reference
from bshub.release.chart_style import PAGE, PRINT, Palette
from bshub.release.charts import MOST_CLASSES, confusion_chart, curve_chart, timeline_chart
from bshub.release.evidence import FATES, Evidence, Layer
from bshub.release.score_chart import scores_chart
from bshub.release.wording import hardened, images_name, repair_passes

PLOTTED_LAYERS = 20  # of the picture for the card
CONFUSED = 12  # rows of the table that replaces a large matrix
SCORES_CAPTION = (
    "Each point is a filter, each row a layer; right of the line a filter stands out more than the threshold allows"
)
CURVE_CAPTION = (
    "Accuracy on the {images} at each threshold that was tried, before any repair. On top the number of filters "
    "flagged; the ring marks the choice, the dashed line what pruning may cost."
)
_DRAW = """
for (const data of document.querySelectorAll("script[type='application/json']"))
  vegaEmbed(data.previousElementSibling, JSON.parse(data.textContent),
    {actions: false, renderer: "svg", tooltip: {disableDefaultStyle: true}});
"""


def report_page(evidence: Evidence, report: dict[str, Any], names: Sequence[str], command: str) -> str:
    """The page.

    Args:
        evidence: Of the run.
        report: Of the run.
        names: Name of each class.
        command: The command line that made it.

    Returns:
        HTML; everything foreign is escaped.
    """
    shown = [printable(name, 60) for name in names]
    script = _vega()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(big=lambda number: f"{number:,}", rate=rate_text, dotted=_dotted)
    confused = {*evidence.labels, *evidence.before, *evidence.after}
    return environment.get_template("report.html.jinja").render(
        title=f"{printable(shown_reference(report['model']['reference']), 120)}, sanitized",
        report=report,
        evidence=evidence,
        tiles=_tiles(report),
        rows=_rows(evidence.layers, report),
        charts={name: _json(chart) for name, chart in _charts(evidence, report, shown, PAGE).items()},
        changed=_changed(evidence, shown) if len(confused) > MOST_CLASSES else [],
        command=printable(command, 2000),
        css=Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8")),
        vega=Markup(script),
        # Vega compiles its own expressions, hence eval; they hold nothing foreign
        policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}' 'unsafe-eval'",
        images=images_name(report),
        hardened=hardened(report),
        passes=repair_passes(report),
        fates=FATES if "shrink" in report else FATES[:-1],
    )


def write_plots(folder: Path, evidence: Evidence, report: dict[str, Any]) -> list[Plot]:
    """Draw the card's pictures into ``folder/plots``.

    Returns:
        Their paths in the folder.
    """
    plots = folder / "plots"
    plots.mkdir()
    mu = evidence.threshold.mu
    marked = sorted(evidence.layers, key=lambda layer: -max(layer.scores, default=0))[:PLOTTED_LAYERS]
    layers = [layer for layer in evidence.layers if layer in marked]
    which = f"the {len(layers)} layers with the highest scores" if len(layers) < len(evidence.layers) else "all layers"
    alt, caption = f"Scores of the filters of {len(layers)} layers", f"{SCORES_CAPTION}; {which}."
    found = [("scores", scores_chart(layers, mu, PRINT), alt, caption)]
    if evidence.threshold.curve:
        chart = curve_chart(evidence.threshold, PRINT)
        found.append(("curve", chart, "Accuracy by threshold", CURVE_CAPTION.format(images=images_name(report))))
    done = []
    for name, chart, alt, caption in found:
        specification = {**chart.to_dict(validate=False), "width": 640, "background": "#ffffff", "padding": 12}
        (plots / f"{name}.png").write_bytes(vl_convert.vegalite_to_png(specification, scale=2))
        done.append(Plot(f"plots/{name}.png", alt, caption))
    return done


@cache
def _vega() -> str:
    """Vega, Vega-Lite and their embedding as one script that draws every chart of the page."""
    return vl_convert.javascript_bundle(_DRAW).replace("</script", "<\\/script")


def _json(chart: Any) -> Any:
    """A specification that cannot end the element it stands in."""
    text = json.dumps(chart.to_dict(validate=False), ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _charts(evidence: Evidence, report: dict[str, Any], names: Sequence[str], palette: Palette) -> dict[str, Any]:
    charts = {"scores": scores_chart(evidence.layers, evidence.threshold.mu, palette)}
    if evidence.threshold.curve:
        charts["curve"] = curve_chart(evidence.threshold, palette)
    if len({*evidence.labels, *evidence.before, *evidence.after}) <= MOST_CLASSES:
        unique = _unique(names)
        charts["before"] = confusion_chart(evidence.labels, evidence.before, unique, palette)
        charts["after"] = confusion_chart(evidence.labels, evidence.after, unique, palette)
    charts["timeline"] = timeline_chart(report["seconds"], palette)
    return charts


def _dotted(name: str) -> Markup:
    """A qualified name that may break behind its dots."""
    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


def _unique(names: Sequence[str]) -> list[str]:
    """Two classes of one name would become one row of a matrix."""
    seen = Counter(names)
    return [f"{name} ({index})" if seen[name] > 1 else name for index, name in enumerate(names)]


def _changed(evidence: Evidence, names: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """The commonest mistakes, before or after: (class, taken for, times before, times after)."""
    before, after = (
        Counter((label, answer) for label, answer in zip(evidence.labels, answers, strict=True) if label != answer)
        for answers in (evidence.before, evidence.after)
    )
    common = (before + after).most_common(CONFUSED)
    return [(names[label], names[answer], before[label, answer], after[label, answer]) for (label, answer), _ in common]


def _tiles(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(title, before, after, what it is counted on)."""
    evaluation = report.get("evaluation") or {}
    rates = [(key, title) for key, title in (("accuracy", "clean accuracy"), ("asr", "attack success rate"))]
    tiles = []
    for key, title in rates:
        before, after = (evaluation.get(when, {}).get(key) for when in ("before", "after"))
        if before and after:
            lost = evaluation.get("accuracy_lost") if key == "accuracy" else None
            by_pairs = f"; lost: {lost['low']:.1f} to {lost['high']:.1f} points" if lost else ""
            tiles.append((title, _percent(before), _percent(after), f"after: {_interval(after)}{by_pairs}"))
    if not tiles:
        clean = report["clean_images"]
        before, after = clean["accuracy_before"], clean["accuracy_after"]
        tiles.append((images_name(report), _percent(before), _percent(after), f"after: {_interval(after)}"))
    for key, title in (("parameters", "parameters"), ("macs", "multiply-accumulates")):
        before, after = report[key]["before"], report[key]["after"]
        tiles.append((title, _count(before), _count(after), f"{100 * (after / before - 1):+.1f} %"))
    return tiles


def _percent(rate: dict[str, Any]) -> str:
    return f"{rate['percent']:.1f} %"


def _interval(rate: dict[str, Any]) -> str:
    return f"{rate['low']:.1f} to {rate['high']:.1f} %, {rate['n']:,} images"


def _count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _rows(layers: Sequence[Layer], report: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of layers in which something happened."""
    rows = []
    for layer in layers:
        fates = Counter(layer.fates)
        if fates["kept"] < len(layer.fates):
            why = report["stays"].get(layer.name, "")
            rows.append({"name": layer.name, "filters": len(layer.index), "fates": fates, "why": why})
    return rows
