"""The other charts of a report: accuracy by threshold, confusion, the steps of the run; by Altair, as Vega-Lite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from bshub.release.chart_style import Palette, dressed
from bshub.scoring.selection import Threshold

MOST_CLASSES = 20  # in a matrix


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
    return dressed(alt.layer(*charts).properties(height=260), palette)


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
    return dressed((cells + text).properties(height=max(180, 24 * len(order))), palette)


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
    return dressed((bars + text).properties(height=22 * len(rows)), palette)
