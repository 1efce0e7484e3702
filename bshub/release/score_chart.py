"""The chart of the scores: which filters look suspicious, layer by layer, and where the threshold lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from bshub.release.chart_style import PAGE, Palette, dressed, short
from bshub.release.evidence import FATES, STATISTICS, Layer

POINTS = 3000  # drawn filters beside the flagged ones: more would make a phone crawl
ROW = 15  # pixels a layer
NAME, LONG_NAME = 20, 42  # characters of a layer's name, its end, which tells it from its neighbours
WIDE = 560  # pixels of a chart that has room for long names
WORDS = {
    "spectral": "spectral norm",
    "saliency": "mean |gradient|",
    "activation": "activation (rms)",
    "correlation": "correlation",
    "bn_shift": "shift from training",
}


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
    return dressed(alt.layer(*charts).properties(height=ROW * len(layers)), palette)


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
                    "score": short(layer.scores[k]),
                    **{name: short(values[k]) for name, values in layer.statistics.items()},
                }
            )
    return rows


def _spread(layer: Layer) -> dict[str, Any]:
    """From the fifth to the ninety-fifth percentile of a layer."""
    rising = sorted(layer.scores)
    last = len(rising) - 1
    return {"layer": layer.name, "low": short(rising[round(0.05 * last)]), "high": short(rising[round(0.95 * last)])}
