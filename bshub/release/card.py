"""The model card: what was done to which model, measured how, and how to load the result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from bshub.errors import printable
from bshub.intake.models import LoadedModel
from bshub.intake.recipe import Recipe

TEMPLATE = """\
# {{ name }}, sanitized

This is `{{ reference }}` after [bshub](#how-to-make-it) looked for filters that could carry a backdoor, removed
them physically and repaired the network on {{ report.clean_images.n }} clean images.

| | before | after |
|---|---|---|
{% for row in rows -%}
| {{ row[0] }} | {{ row[1] }} | {{ row[2] }} |
{% endfor %}
Rates are in percent with a 95 % Wilson interval and the number of images.

## What was removed

{{ counts.flagged }} of {{ report.diagnosis.filters }} filters were flagged: their score `{{ report.diagnosis.score }}`
lies more than {{ "%.2f"|format(report.diagnosis.threshold.mu) }} standard deviations above their layer's mean
({{ report.diagnosis.threshold.reason }}). {{ counts.removed }} left the network physically,
{% if counts.followers %}{{ counts.followers }} filters that depended on them left with them, {% endif -%}
{{ counts.silenced }} were silenced in place because another branch shares their channel. On
{{ report.proof.images }} real images the smaller network's logits equalled those of the masked original
(relative error {{ "%.1e"|format(report.proof.error) }}) before the repair.

## Limits

{% if asr -%}
The attack success rate above is for the one trigger that was given; it was used to measure, never to choose.
{% else -%}
No trigger was known, so no attack success rate was measured: removing suspicious filters is no proof that the
model had a backdoor, nor that none is left.
{% endif -%}
{% for warning in report.warnings -%}
{{ warning }}
{% endfor %}
## How to load it

With torch and {{ library }} alone:

```python
{{ loader }}
```

or `bshub.load("…").module`. 

Preprocessing:

{% for key, value in preprocessing.items() -%}
- {{ key }}: `{{ value }}`
{% endfor -%}{% if onnx %}
`model.onnx` takes normalised `images` of shape `[batch, {{ size }}]` and gives `logits`; it agrees with the torch
model to {{ "%.1e"|format(onnx.error) }} of the largest logit.
{% endif %}
## How to make it

```
{{ command }}
```
"""

_LOADERS = {
    "timm": """\
import json, timm, torch
from safetensors.torch import load_file

cfg, state = json.load(open("config.json")), load_file("model.safetensors")
model = timm.create_model(cfg["architecture"], num_classes=cfg["num_classes"], **cfg.get("model_args", {}))
""",
    "torchvision": """\
import json, torch, torchvision
from safetensors.torch import load_file

cfg, state = json.load(open("config.json")), load_file("model.safetensors")
name = cfg["architecture"].removeprefix("torchvision/")
model = torchvision.models.get_model(name, num_classes=cfg["num_classes"], **cfg.get("model_args", {}))
""",
}
_CIFAR_STEM = """\
first = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d))
old = model.get_submodule(first)
model.set_submodule(first, torch.nn.Conv2d(3, old.out_channels, 3, 1, 1, bias=old.bias is not None))
pool = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.MaxPool2d))
model.set_submodule(pool, torch.nn.Identity())
"""
_BUFFERS = """\
for name, axes in cfg["bshub"]["kept"].items():
    if name not in state:  # a buffer that the constructor made at its full width
        owner, _, leaf = name.rpartition(".")
        for axis, r in axes.items():
            index = [i for a, b in zip(r[::2], r[1::2]) for i in range(a, b + 1)]
            buffers = model.get_submodule(owner)._buffers
            buffers[leaf] = buffers[leaf].index_select(int(axis), torch.tensor(index))
"""
_REFILL = """\
def refill(module, axis, width, *r):  # zeros at the places of channels that left, while the module slides along them
    kept = torch.tensor([i for a, b in zip(r[::2], r[1::2]) for i in range(a, b + 1)])
    wide = lambda x: x.new_zeros(*x.shape[:axis], width, *x.shape[axis + 1 :]).index_copy(axis, kept, x)
    module.register_forward_pre_hook(lambda m, args: (wide(args[0]),))
    module.register_forward_hook(lambda m, args, y: y.index_select(axis, kept))
for name, places in cfg["bshub"]["refilled"].items():
    refill(model.get_submodule(name), *places)
"""
_NARROW = """\
for name, attributes in cfg["bshub"]["attributes"].items():
    vars(model.get_submodule(name)).update(attributes)
for name, tensor in state.items():
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    store = module._parameters if leaf in module._parameters else module._buffers
    store[leaf] = torch.nn.Parameter(tensor) if store is module._parameters else tensor
model.eval()"""


def loader_text(library: str, stem: str | None, buffers: bool = False, refilled: bool = False) -> str:
    """Python that rebuilds the sanitized network in its own folder, with torch and the model library alone.

    Args:
        library: ``timm`` or ``torchvision``.
        stem: ``cifar`` where the stem was replaced.
        buffers: Whether buffers that no checkpoint holds were narrowed.
        refilled: Whether modules slide along their channels.
    """
    extras = (_CIFAR_STEM if stem else "") + (_BUFFERS if buffers else "") + (_REFILL if refilled else "")
    return _LOADERS[library] + extras + _NARROW


def model_card(source: LoadedModel, model: nn.Module, recipe: Recipe, report: dict[str, Any], command: str) -> str:
    """The text of the artifact's ``README.md``.

    Args:
        source: The model before.
        model: The model after.
        recipe: Its recipe.
        report: Of the run.
        command: The command line that made it.

    Returns:
        YAML front matter and Markdown; everything foreign is escaped.
    """
    origin = source.origin
    name = origin.base_model or origin.architecture.name
    environment = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    evaluation = report.get("evaluation") or {}
    text = environment.from_string(TEMPLATE).render(
        name=escape(name),
        reference=re.sub(r"[^\w./:@?&=,+ -]", "_", shown_reference(origin.reference))[:300],
        report={**report, "warnings": [escape(warning) for warning in report["warnings"]]},
        counts=report["counts"],
        rows=_rows(report),
        asr=(evaluation.get("after") or {}).get("asr"),
        library=origin.architecture.library,
        loader=loader_text(
            origin.architecture.library,
            recipe.stem,
            bool(recipe.kept.keys() - model.state_dict().keys()),
            bool(recipe.refilled),
        ),
        preprocessing=source.preprocessing.config,
        onnx=report.get("onnx"),
        size=", ".join(map(str, source.preprocessing.input_size)),
        command=printable(command, 2000).replace("```", ""),
    )
    return f"---\n{_front_matter(source, name, evaluation).to_yaml()}\n---\n\n{text}"


def _front_matter(source: LoadedModel, name: str, evaluation: dict[str, Any]) -> ModelCardData:
    accuracy = (evaluation.get("after") or {}).get("accuracy")
    results = (
        [
            EvalResult(
                task_type="image-classification",
                dataset_type="imagefolder",
                dataset_name=f"held-out images (n={accuracy['n']})",
                metric_type="accuracy",
                metric_value=accuracy["percent"] / 100,
            )
        ]
        if accuracy
        else None
    )
    extra: dict[str, Any] = {}
    if source.origin.licence:
        extra["license"] = source.origin.licence
    if source.origin.base_model:
        extra.update(base_model=source.origin.base_model, base_model_relation="finetune")
    return ModelCardData(
        library_name=source.origin.architecture.library,
        pipeline_tag="image-classification",
        tags=["bshub", "backdoor-sanitized", "pruned"],
        model_name=name if results else None,
        eval_results=results,
        **extra,
    )


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    evaluation = report.get("evaluation") or {}
    for key, title in (("accuracy", "clean accuracy"), ("asr", "attack success rate"), ("ra", "robust accuracy")):
        before, after = (evaluation.get(when, {}).get(key) for when in ("before", "after"))
        if before and after:
            rows.append((title, rate_text(before), rate_text(after)))
    clean = report["clean_images"]
    rows.append(
        ("accuracy on the clean images used", rate_text(clean["accuracy_before"]), rate_text(clean["accuracy_after"]))
    )
    for key, title in (("parameters", "parameters"), ("macs", "multiply-accumulates per image")):
        rows.append((title, f"{report[key]['before']:,}", f"{report[key]['after']:,}"))
    return rows


def shown_reference(reference: str) -> str:
    """A reference for a public page: of a local path only the last part, which says nothing of a machine."""
    return Path(reference).name if Path(reference).exists() else reference


def rate_text(rate: dict[str, Any]) -> str:
    """``83.4 [80.9, 85.6] n=1000`` from a report's rate."""
    return f"{rate['percent']:.1f} [{rate['low']:.1f}, {rate['high']:.1f}] n={rate['n']}"


def escape(text: object) -> str:
    """Foreign text for Markdown: control characters and everything with a meaning in Markdown or HTML escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~])", r"\\\1", printable(text, 500))
