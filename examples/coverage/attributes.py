"""What timm says of a network stays true once it is narrowed: ``python examples/coverage/attributes.py [NAME …]``.

For every timm network of ``models.txt``: the channels of ``forward_features``, the inputs of ``get_classifier()``, a
new classifier by ``reset_classifier``, and the channels that ``feature_info`` promises for ``forward_intermediates``.
A property counts as broken where the original has it and the narrowed network has not. Exit code 1 if one is.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from probe import build, choose
from run import models
from torch import nn

from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import find_pairs
from bshub.surgery.remove import remove


def features(model: Any, images: torch.Tensor) -> bool:
    """``forward_features`` gives ``num_features`` channels, on the axis that the network keeps them on."""
    return model.num_features in model.forward_features(images).shape[1:]


def classifier(model: Any, images: torch.Tensor) -> bool:
    """``get_classifier()`` reads ``head_hidden_size`` inputs, or ``num_features`` where there is no such width."""
    head = model.get_classifier()
    width = getattr(model, "head_hidden_size", None) or model.num_features
    return (head.in_features if isinstance(head, nn.Linear) else head.in_channels) == width


def new_classifier(model: Any, images: torch.Tensor) -> bool:
    """A classifier of seven classes fits what the body gives."""
    other = copy.deepcopy(model)
    other.reset_classifier(7)
    return other(images).shape == (len(images), 7)


def levels(model: Any, images: torch.Tensor) -> bool:
    """``feature_info`` has the channels of each intermediate."""
    found = model.forward_intermediates(images, intermediates_only=True)
    info = model.feature_info
    told = info.channels() if hasattr(info, "channels") else [level["num_chs"] for level in info]
    return [level.shape[1] for level in found] == list(told)


PROPERTIES: dict[str, Callable[[Any, torch.Tensor], bool]] = {
    "forward_features": features,
    "get_classifier": classifier,
    "reset_classifier": new_classifier,
    "feature_info": levels,
}


def holds(judge: Callable[[Any, torch.Tensor], bool], model: nn.Module, images: torch.Tensor) -> bool:
    """Whether the network has the property; one that raises has not."""
    try:
        with torch.no_grad():
            return bool(judge(model, images))
    except Exception:
        return False


def look(reference: str) -> tuple[list[str], list[str]]:
    """(properties of the original, those of them that the narrowed network lacks)."""
    model, size = build(reference)
    images = torch.randn(2, *size)
    flow, _ = follow_channels(model, size)
    pairing = find_pairs(model, flow)
    small = remove(model, flow, pairing, choose(flow, pairing), images).model
    had = [name for name, judge in PROPERTIES.items() if holds(judge, model, images)]
    return had, [name for name in had if not holds(PROPERTIES[name], small.eval(), images)]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = sys.argv[1:] or [name for _, name in models() if name.startswith("timm/")]
    counts, broken = dict.fromkeys(PROPERTIES, 0), 0
    for name in names:
        had, lost = look(name)
        for key in had:
            counts[key] += 1
        broken += bool(lost)
        print(name, f"loses {', '.join(lost)}" if lost else "keeps " + (", ".join(had) or "nothing"), flush=True)
    print(f"{len(names)} networks, {broken} lose something; had by the originals: {counts}")
    sys.exit(int(broken > 0))


if __name__ == "__main__":
    main()
