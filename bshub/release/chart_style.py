"""Colours and lettering that all charts share.

Every chart takes a ``Palette``. On the page the colours are CSS variables, so light and dark need no second drawing;
in a picture file they are plain values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


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


def short(value: float) -> float | None:
    """Four digits are enough to look at; what is not finite is left out."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def dressed(chart: Any, palette: Palette) -> Any:
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
