"""Rows → figures: one group of rows a model, method and sample count; one line a method over all models."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bshub.benchmark.rows import on_weights

Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """The draws of one method on one model with one number of samples.

    Attributes:
        model: Name of the model.
        method: As asked for.
        per_class: Clean images per class.
        effort: Share of the published iterations.
        rows: One a seed, those that failed left out.
        failed: Why the others failed.
    """

    model: str
    method: str
    per_class: int
    effort: float
    rows: tuple[Row, ...]
    failed: tuple[str, ...]

    @property
    def attacked(self) -> bool:
        """Whether the model has a backdoor; needs a row."""
        return bool(self.rows[0]["before"].get("asr"))

    def mean(self, pick: Callable[[Row], float | None]) -> float | None:
        """Mean over the draws; None where there is nothing."""
        return mean(pick(row) for row in self.rows)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is there."""
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def rate(when: str, name: str) -> Callable[[Row], float | None]:
    """``rate("after", "asr")(row)`` in percent."""
    return lambda row: (row[when].get(name) or {}).get("percent")


def accuracy_drop(row: Row) -> float | None:
    """Points of clean accuracy that were lost; negative where it rose."""
    return row["before"]["accuracy"]["percent"] - row["after"]["accuracy"]["percent"]


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows by model, sample count, method and effort; the last row of one cell counts."""
    latest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        cell = row["cell"]
        latest[(*_key(cell), cell["seed"])] = row
    found: dict[tuple[Any, ...], list[Row]] = {}
    for key, row in latest.items():
        found.setdefault(key[:-1], []).append(row)
    return [
        Group(
            model,
            method,
            per_class,
            effort,
            tuple(row for row in members if "after" in row),
            tuple(row["failed"] for row in members if "failed" in row),
        )
        for (model, method, per_class, effort), members in found.items()
    ]


def _key(cell: dict[str, Any]) -> tuple[str, str, int, float]:
    return cell["model"], cell["method"], cell["per_class"], cell["effort"]


@dataclass(frozen=True)
class Line:
    """One method over all backdoored models with one number of samples.

    Attributes:
        method: As asked for.
        models: How many models it was measured on.
        asr: Mean ASR after, percent.
        worst: Highest ASR after, percent.
        drop: Mean loss of clean accuracy, points.
        der: Mean defense effectiveness rating.
        control: Mean loss of clean accuracy on models without a backdoor, points; None where none was measured.
        seconds: Median.
        ratio: Median of the seconds over those of one bare forward and backward.
        megabytes: Median growth of the peak memory.
    """

    method: str
    models: int
    asr: float | None
    worst: float | None
    drop: float | None
    der: float | None
    control: float | None
    seconds: float | None
    ratio: float | None
    megabytes: float | None


def lines(found: Iterable[Group], per_class: int, models: Iterable[str] | None = None) -> list[Line]:
    """A line a method; methods that look at no image join every sample count.

    Only models that every listed method was measured on may be compared: pass them as ``models``.
    """
    wanted = None if models is None else set(models)
    by_method: dict[str, list[Group]] = {}
    for group in found:
        joins = group.per_class == per_class or on_weights(group.method)
        if joins and group.rows and (wanted is None or group.model in wanted):
            by_method.setdefault(group.method, []).append(group)
    result = []
    for method, members in by_method.items():
        attacked = [group for group in members if group.attacked]
        clean = [group for group in members if not group.attacked]
        rows = [row for group in members for row in group.rows]
        after = [group.mean(rate("after", "asr")) for group in attacked]
        result.append(
            Line(
                method,
                len(attacked),
                mean(after),
                max((value for value in after if value is not None), default=None),
                mean(group.mean(accuracy_drop) for group in attacked),
                mean(group.mean(lambda row: row["der"]) for group in attacked),
                mean(group.mean(accuracy_drop) for group in clean),
                statistics.median(row["seconds"] for row in rows),
                statistics.median(row["ratio"] for row in rows),
                _median(row["megabytes"] for row in rows),
            )
        )
    return sorted(result, key=lambda line: -(line.der or 0))


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None
