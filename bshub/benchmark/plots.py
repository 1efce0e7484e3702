"""Plots of a benchmark as PNG, drawn by vl-convert without a browser."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bshub.benchmark.rows import on_weights
from bshub.benchmark.summary import Group, Row, accuracy_drop, groups, rate

WIDTH, HEIGHT = 520, 300
MOST_MU = 10
OURS, OURS_COLOR = "bshub", "#111827"  # nearly black: a scheme of colors would begin again at the eleventh method
OTHERS = ("#4c78a8", "#f58518", "#e45756", "#54a24b", "#b8a21a", "#b279a2", "#ff8fa3", "#9d755d", "#94a3b8",
          "#2dd4bf", "#7c3aed", "#be123c", "#0ea5e9", "#84cc16")  # fmt: skip


def draw_plots(rows: Sequence[Row], folder: Path) -> list[tuple[str, str]]:
    """The plots that the rows allow.

    Args:
        rows: Of a benchmark.
        folder: Where the files go.

    Returns:
        (file, caption) of each.
    """
    found = [group for group in groups(rows) if group.rows and group.attacked]
    drawn = []
    count, points = _trade(found)
    if points:
        caption = f"ASR after against accuracy lost, a point a model; {count or 'no'} clean images per class"
        drawn.append(_save(trade_chart(points), folder, "trade.png", caption))
    curve = _mu_curve(found)
    if len({point["mu"] for point in curve}) > 2:
        drawn.append(
            _save(mu_chart(curve), folder, "mu.png", "ACC and ASR after, by threshold μ; dots: what auto chose")
        )
    counts = _by_count(found)
    if len({point["per_class"] for point in counts}) > 1:
        caption = "ASR after, by clean images per class; of each method the models that were measured with all of them"
        drawn.append(_save(count_chart(counts), folder, "samples.png", caption))
    return drawn


def _save(chart: Any, folder: Path, name: str, caption: str) -> tuple[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    chart.save(str(folder / name), scale_factor=2)
    return name, caption


def _trade(found: Sequence[Group]) -> tuple[int, list[dict[str, Any]]]:
    """The number of images per class that most was measured with, and a point for each model and method."""
    plain = [group for group in found if ":" not in group.method]
    asked = Counter(group.per_class for group in plain if not on_weights(group.method))
    most = asked.most_common(1)[0][0] if asked else 0
    points = [
        {
            "model": group.model,
            "method": group.method,
            "per_class": group.per_class,
            "asr": group.mean(rate("after", "asr")),
            "drop": group.mean(accuracy_drop),
        }
        for group in plain
        if group.per_class == most or on_weights(group.method)
    ]
    return most, points


def _mu_curve(found: Sequence[Group]) -> list[dict[str, Any]]:
    """Rows of ``bshub:mu=…``, and beside them the plain ``bshub`` of the same model with as many clean images."""
    points: list[dict[str, Any]] = []
    swept = set()
    for group in found:
        name, _, options = group.method.partition(":")
        if name != "bshub" or (options and not options.startswith("mu=")) or "," in options:
            continue
        mu = float(options.removeprefix("mu=")) if options else group.mean(lambda row: row["notes"]["mu"])
        if mu is None or mu > MOST_MU:  # auto may have found nothing to remove
            continue
        where = {"model": group.model, "per_class": group.per_class}
        if options:
            swept.add(tuple(where.values()))
        for figure, kind in (("asr", "ASR"), ("accuracy", "ACC")):
            value = group.mean(rate("after", figure))
            points.append({**where, "mu": mu, "chosen": not options, "kind": kind, "percent": value})
    return [point for point in points if (point["model"], point["per_class"]) in swept]


def _by_count(found: Sequence[Group]) -> list[dict[str, Any]]:
    """Points of the methods that were measured with several numbers of images, over the models that have them all."""
    plain = [group for group in found if ":" not in group.method and group.per_class]
    points = []
    for method in dict.fromkeys(group.method for group in plain):
        mine = [group for group in plain if group.method == method]
        counts = {group.per_class for group in mine}
        have = {model: {g.per_class for g in mine if g.model == model} for model in {g.model for g in mine}}
        points += [
            {
                "model": group.model,
                "method": method,
                "per_class": group.per_class,
                "asr": group.mean(rate("after", "asr")),
            }
            for group in mine
            if len(counts) > 1 and have[group.model] == counts
        ]
    return points


def trade_chart(points: list[dict[str, Any]]) -> Any:
    """ASR after over accuracy lost."""
    import altair as alt

    return _styled(
        alt.Chart(alt.InlineData(values=points))
        .mark_point(size=70, filled=True, opacity=0.75)
        .encode(
            x=alt.X("drop:Q", title="points of clean accuracy lost"),
            y=alt.Y("asr:Q", title="ASR after, %", scale=alt.Scale(domain=[0, 100])),
            color=_colored(points),
            shape=alt.Shape("method:N", title=None, scale=alt.Scale(domain=_methods(points))),
        )
    )


def mu_chart(points: list[dict[str, Any]]) -> Any:
    """ACC and ASR over μ, a panel a model; what ``auto`` chose as dots."""
    import altair as alt

    base = alt.Chart(alt.InlineData(values=points)).encode(
        x=alt.X("mu:Q", title="μ"),
        y=alt.Y("percent:Q", title="%", scale=alt.Scale(domain=[0, 100])),
        color=alt.Color("kind:N", title=None, scale=alt.Scale(domain=["ACC", "ASR"], range=["#2563eb", "#c2410c"])),
    )
    swept = base.transform_filter("!datum.chosen").mark_line(point=False)
    chosen = base.transform_filter("datum.chosen").mark_point(size=110, filled=True)
    panels = alt.layer(swept, chosen).properties(width=WIDTH // 2, height=HEIGHT // 2)
    return panels.facet(alt.Facet("model:N", title=None), columns=2).configure_view(strokeWidth=0)


def count_chart(points: list[dict[str, Any]]) -> Any:
    """Mean ASR over the number of images per class."""
    import altair as alt

    return _styled(
        alt.Chart(alt.InlineData(values=points))
        .mark_line(point=True)
        .encode(
            x=alt.X("per_class:O", title="clean images per class", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("mean(asr):Q", title="mean ASR after, %", scale=alt.Scale(domain=[0, 100])),
            color=_colored(points),
        )
    )


def _colored(points: list[dict[str, Any]]) -> Any:
    """A color for each method, ours the darkest."""
    import altair as alt

    names = _methods(points)  # the same for the shapes: two scales that differ get two legends
    others = itertools.cycle(OTHERS)
    range_ = [OURS_COLOR if name == OURS else next(others) for name in names]
    return alt.Color("method:N", title=None, scale=alt.Scale(domain=names, range=range_))


def _methods(points: list[dict[str, Any]]) -> list[str]:
    return sorted({point["method"] for point in points})


def _styled(chart: Any) -> Any:
    return (
        chart.properties(width=WIDTH, height=HEIGHT).configure_view(strokeWidth=0).configure_axis(gridColor="#e5e7eb")
    )
