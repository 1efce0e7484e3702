"""Experiment 3: all methods over the models that each of them was measured on, then every model."""

from __future__ import annotations

import textwrap
from typing import Any

from detail_page import detail_table

from bshub.benchmark.page import number
from bshub.benchmark.summary import Group, lines


def methods_table(found: list[Group], wanted: Any) -> list[str]:
    """A table of all methods on the models they share, others of fewer methods on more models, and the details.

    Args:
        found: Groups of the experiment.
        wanted: The experiment.

    Returns:
        Lines of Markdown.
    """
    attacked = {g.model for g in found if g.rows and g.attacked}
    have = {method: {g.model for g in found if g.method == method and g.rows} for method in {g.method for g in found}}
    table = ["*clean model*: ACC lost on the innocent control. A table compares methods on the very same models."]
    told: set[frozenset[str]] = set()
    counts = {method: len(models & attacked) for method, models in have.items()}
    for least in sorted(set(counts.values()) - {0}):
        methods = [method for method, count in counts.items() if count >= least]
        shared = frozenset(set.intersection(*(have[method] for method in methods)))
        if len(methods) > 1 and shared & attacked and shared not in told:
            told.add(shared)
            table += ["", *_means([g for g in found if g.method in methods], wanted.per_class[0], shared, attacked)]
    return [*table, "", "### Every model", "", *detail_table(found, wanted)]


def _means(found: list[Group], per_class: int, shared: frozenset[str], attacked: set[str]) -> list[str]:
    models = sorted(shared & attacked)
    where = (
        f"Means over {len(models)} backdoored models ({', '.join(models)})" if len(models) > 1 else f"On {models[0]}"
    )
    text = f"{where}, {per_class} clean images per class:"
    table = [
        *textwrap.wrap(text, 116),
        "",
        "| method | mean ASR | worst ASR | ACC lost | clean model | DER | seconds | ×bare | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines(found, per_class, shared):
        cells = [number(value) for value in (line.asr, line.worst, line.drop, line.control)]
        cells += [number(line.der, 3), number(line.seconds), number(line.ratio, 0), number(line.megabytes, 0)]
        table.append(f"| {line.method} | {' | '.join(cells)} |")
    return table
