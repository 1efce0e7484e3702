"""The charts of a report, as Vega-Lite specifications by Altair.

Every chart takes a ``Palette``. On the page the colours are CSS variables, so light and dark need no second drawing;
in a picture file they are plain values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from bshub.release.evidence import FATES, STATISTICS, Layer
from bshub.scoring.selection import Threshold

POINTS = 3000  # drawn filters beside the flagged ones: more would make a phone crawl
ROW = 15  # pixels a layer
NAME, LONG_NAME = 20, 42  # characters of a layer's name, its end, which tells it from its neighbours
WIDE = 560  # pixels of a chart that has room for long names
MOST_CLASSES = 20  # in a matrix
WORDS = {
    "spectral": "spectral norm",
    "saliency": "mean |gradient|",
    "activation": "activation (rms)",
    "correlation": "correlation",
    "bn_shift": "shift from training",
}


@dataclass(frozen=True)
class Palette:
    """Colours by role."""

    ink: str
    soft: str
    line: str
    dots: str
    removed: str
    silenced: str
    follower: str
    accent: str
    spare: str

    @property
    def fates(self) -> list[str]:
        """In the order of ``FATES``."""
        return [self.dots, self.removed, self.silenced, self.follower, self.spare]


PAGE = Palette(*(f"var(--{name})" for name in Palette.__dataclass_fields__))
PRINT = Palette("#1d2430", "#5b6573", "#d9dde3", "#8a97a8", "#c2410c", "#7c3aed", "#0e7490", "#2563eb", "#a16207")


def scores_chart(layers: Sequence[Layer], mu: float, palette: Palette) -> alt.LayerChart:
    """Every layer a row: the spread of its scores, its filters as points, the threshold as a line.

    Args:
        layers: In the order of the rows.
        mu: The threshold in deviations.
        palette: Colours.
    """
    order = [layer.name for layer in layers]
    points = _points(layers)
    spread = [_spread(layer) for layer in layers if layer.scores]
    most = f"(containerSize()[0] > {WIDE} ? {LONG_NAME} : {NAME})" if palette is PAGE else str(LONG_NAME)
    tail = f"length(datum.value) > {most} ? '…' + slice(datum.value, 1 - {most}) : datum.value"
    y = alt.Y(
        "layer:N",
        sort=order,
        title=None,
        scale=alt.Scale(domain=order, paddingOuter=0.3),
        axis=alt.Axis(labelExpr=tail, labelLimit=300),
    )
    title = "deviations from the layer's mean"
    x = alt.X("score:Q", title=title, axis=alt.Axis(tickCount=8, format="d"))
    legend = None if palette is PAGE else alt.Undefined  # the page has its own, which wraps
    shown = FATES if any("spare" in layer.fates for layer in layers) else FATES[:-1]
    scale = alt.Scale(domain=list(shown), range=palette.fates[: len(shown)])
    fate = alt.Color("fate:N", title=None, legend=legend, scale=scale)
    tooltip = [
        alt.Tooltip("layer:N"),
        alt.Tooltip("filter:Q", format="d"),
        alt.Tooltip("fate:N"),
        alt.Tooltip("score:Q", title="score (deviations)", format=".2f"),
        *(
            alt.Tooltip(f"{name}:Q", title=WORDS[name], format=".3~g")
            for name in STATISTICS
            if any(name in layer.statistics for layer in layers)
        ),
    ]
    kept = alt.datum.fate == "kept"
    bars = (
        alt.Chart(alt.Data(values=spread))
        .mark_bar(height=5, color=palette.line, tooltip=None)
        .encode(y=y, x=alt.X("low:Q", title=title), x2="high:Q")
    )
    quiet = (
        alt.Chart(alt.Data(values=points))
        .transform_filter(kept)
        .mark_circle(size=16, opacity=0.45)
        .encode(y=y, x=x, color=fate, tooltip=tooltip)
    )
    loud = (
        alt.Chart(alt.Data(values=points))
        .transform_filter(~kept)
        .mark_circle(size=46, opacity=0.95)
        .encode(y=y, x=x, color=fate, tooltip=tooltip)
    )
    charts: list[Any] = [bars, quiet, loud]
    if mu < 100:  # otherwise nothing may be flagged, and the line would lie far outside
        limit = alt.Chart(alt.Data(values=[{"mu": mu}])).encode(x=alt.X("mu:Q", title=title))
        charts += [
            limit.mark_rule(color=palette.removed, strokeDash=[5, 4], strokeWidth=1.5),
            limit.mark_text(
                text=f"μ = {mu:g}", align="left", baseline="bottom", dx=4, dy=-4, y=0, color=palette.removed
            ),
        ]
    return _dressed(alt.layer(*charts).properties(height=ROW * len(layers)), palette)


def curve_chart(threshold: Threshold, palette: Palette) -> alt.LayerChart:
    """Accuracy on the clean images against μ, with the number of flagged filters and the chosen point.

    Args:
        threshold: With a curve.
        palette: Colours.
    """
    # The tried thresholds side by side, whatever their distance: the fine steps at the end would fall onto each other.
    rows = [
        {"mu": mu, "flagged": flagged, "accuracy": 100 * accuracy, "chosen": mu == threshold.mu}
        for mu, flagged, accuracy in threshold.curve
    ]
    x = alt.X(
        "mu:O",
        title="threshold μ (further right: more is pruned)",
        sort="descending",
        scale=alt.Scale(padding=0.4),
        axis=alt.Axis(format="~g", grid=False, labelAngle=0),
    )
    y = alt.Y(
        "accuracy:Q",
        title="answered right, %",
        scale=alt.Scale(zero=False, padding=18),
        axis=alt.Axis(tickCount=5, grid=True),
    )
    tooltip = [
        alt.Tooltip("mu:Q", title="μ", format="~g"),
        alt.Tooltip("flagged:Q", title="filters flagged"),
        alt.Tooltip("accuracy:Q", title="answered right, %", format=".1f"),
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y, tooltip=tooltip)
    chosen = alt.datum.chosen == True  # noqa: E712 - an expression of Vega
    charts: list[Any] = [
        base.mark_line(color=palette.accent, strokeWidth=2),
        base.mark_circle(color=palette.accent, size=70, opacity=1),
        base.transform_filter(chosen).mark_point(color=palette.removed, size=260, strokeWidth=2.5, opacity=1),
        base.mark_text(color=palette.soft, baseline="bottom", dy=-6).encode(
            text=alt.Text("flagged:Q", format=".3~s"), y=alt.value(0)
        ),
    ]
    if threshold.floor is not None:
        rule = alt.Chart(alt.Data(values=[{"accuracy": 100 * threshold.floor}]))
        charts.insert(0, rule.mark_rule(color=palette.soft, strokeDash=[3, 3]).encode(y=y))
    return _dressed(alt.layer(*charts).properties(height=260), palette)


def confusion_chart(
    labels: Sequence[int], answers: Sequence[int], names: Sequence[str], palette: Palette
) -> alt.LayerChart:
    """Which class was taken for which; the share of a class as opacity, counts as text.

    Args:
        labels: Class of each image.
        answers: The network's.
        names: Of the classes; at most ``MOST_CLASSES`` occur.
        palette: Colours.
    """
    known = sorted({*labels, *answers})
    totals = {label: list(labels).count(label) for label in known}
    counts: dict[tuple[int, int], int] = {}
    for pair in zip(labels, answers, strict=True):
        counts[pair] = counts.get(pair, 0) + 1
    rows = [
        {
            "class": names[label],
            "answer": names[answer],
            "images": number,
            "share": number / totals[label],
            "right": label == answer,
        }
        for (label, answer), number in counts.items()
    ]
    order = [names[index] for index in known]
    x = alt.X(
        "answer:N",
        sort=order,
        scale=alt.Scale(domain=order),
        axis=alt.Axis(labelAngle=-45, labelLimit=90, ticks=False, domain=False),
    )
    y = alt.Y("class:N", sort=order, scale=alt.Scale(domain=order), axis=alt.Axis(labelLimit=90))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y, tooltip=["class:N", "answer:N", "images:Q"])
    right = alt.condition("datum.right", alt.value(palette.accent), alt.value(palette.removed))
    cells = base.mark_rect(cornerRadius=3).encode(
        color=right, opacity=alt.Opacity("share:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=[0.12, 0.85]))
    )
    text = base.mark_text(color=palette.ink, fontSize=10).encode(text="images:Q")
    return _dressed((cells + text).properties(height=max(180, 24 * len(order))), palette)


def timeline_chart(seconds: dict[str, float], palette: Palette) -> alt.LayerChart:
    """The steps of the run, one after the other.

    Args:
        seconds: Step → seconds, in order.
        palette: Colours.
    """
    rows, start = [], 0.0
    for name, duration in seconds.items():
        rows.append({"step": name, "start": start, "end": start + duration, "seconds": duration})
        start += duration
    order = list(seconds)
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("step:N", sort=order, title=None, scale=alt.Scale(domain=order)),
        tooltip=["step:N", alt.Tooltip("seconds:Q", format=".2f")],
    )
    bars = base.mark_bar(color=palette.accent, height=11, cornerRadius=2).encode(
        x=alt.X(
            "start:Q",
            title="seconds",
            scale=alt.Scale(domain=[0, start * 1.12 or 1], nice=False),
            axis=alt.Axis(tickCount=6),
        ),
        x2="end:Q",
    )
    text = base.mark_text(align="left", dx=5, color=palette.soft).encode(
        x="end:Q", text=alt.Text("seconds:Q", format=".1f")
    )
    return _dressed((bars + text).properties(height=22 * len(rows)), palette)


def _points(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """All filters that did not stay, and as many others as can be drawn: the highest and evenly many below."""
    room = max(8, POINTS // max(len(layers), 1))
    rows = []
    for layer in layers:
        falling = sorted(range(len(layer.index)), key=lambda k: -layer.scores[k])
        kept = [k for k in falling if layer.fates[k] == "kept"]
        high, rest = kept[: room // 2], kept[room // 2 :]
        step = max(1, math.ceil(len(rest) / max(room - len(high), 1)))
        for k in [k for k in falling if layer.fates[k] != "kept"] + high + rest[::step]:
            rows.append(
                {
                    "layer": layer.name,
                    "filter": layer.index[k],
                    "fate": layer.fates[k],
                    "score": _short(layer.scores[k]),
                    **{name: _short(values[k]) for name, values in layer.statistics.items()},
                }
            )
    return rows


def _spread(layer: Layer) -> dict[str, Any]:
    """From the fifth to the ninety-fifth percentile of a layer."""
    rising = sorted(layer.scores)
    last = len(rising) - 1
    return {"layer": layer.name, "low": _short(rising[round(0.05 * last)]), "high": _short(rising[round(0.95 * last)])}


def _short(value: float) -> float | None:
    """Four digits are enough to look at; what is not finite is left out."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _dressed(chart: Any, palette: Palette) -> Any:
    """Size and colours that all charts share."""
    axis = {
        "labelColor": palette.soft,
        "titleColor": palette.soft,
        "titleFontWeight": "normal",
        "titlePadding": 10,
        "gridColor": palette.line,
        "domainColor": palette.line,
        "tickColor": palette.line,
        "labelFontSize": 11,
        "labelLimit": 130,
        "labelPadding": 6,
        "titleFontSize": 12,
    }
    legend = {"labelColor": palette.ink, "labelFontSize": 12, "orient": "top", "symbolOpacity": 1, "offset": 26}
    return chart.properties(
        width="container", background="transparent", autosize={"type": "fit-x", "contains": "padding"}
    ).configure(
        font="system-ui, -apple-system, Segoe UI, Roboto, sans-serif",
        view={"stroke": None},
        axis=axis,
        axisY={"grid": False, "ticks": False, "domain": False},
        legend=legend,
    )
