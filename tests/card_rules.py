"""What the Hub documents about the front matter of a model card, as far as bshub writes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml


def faults(content: str) -> list[str]:
    """One message for each thing that the Hub would refuse in a card; a card without front matter passes there."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if not found:
        return []
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [str(error).splitlines()[0]]
    return [f'"{key}" {what}' for key, test, what in RULES if key in data and not test(data[key])]


def is_text(value: object) -> bool:
    """A string with something in it."""
    return isinstance(value, str) and bool(value.strip())


def is_index(value: object) -> bool:
    """A `model-index`: named models, each result with task, data set and metrics."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            is_text(model["name"])
            and all(
                is_text(result["task"]["type"])
                and is_text(result["dataset"]["type"])
                and is_text(result["dataset"]["name"])
                and result["metrics"]
                and all(is_text(metric["type"]) and metric["value"] is not None for metric in result["metrics"])
                for result in model["results"]
            )
            for model in value
        )
    )


def is_repo(value: object) -> bool:
    """``user/name``."""
    return isinstance(value, str) and bool(re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", value))


LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-nc-4.0", "cc-by-4.0", "gpl-3.0", "openrail", "unknown", "other"}
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    ("license", lambda v: v in LICENCES, "must be one of the Hub's licences"),
    ("license_name", lambda v: is_text(v), "must be a string"),
    ("base_model", lambda v: all(map(is_repo, [v] if isinstance(v, str) else v)), "must be a model id"),
    ("base_model_relation", lambda v: v in RELATIONS, "must be adapter, merge, quantized or finetune"),
    ("library_name", lambda v: bool(re.fullmatch(r"[\w-]+", str(v))), "must be a name"),
    ("pipeline_tag", lambda v: v == "image-classification", "must be a task"),
    ("tags", lambda v: isinstance(v, list) and all(is_text(tag) for tag in v), "must be an array of strings"),
    ("model-index", is_index, "must list results with task, dataset and metrics"),
]
