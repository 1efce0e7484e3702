"""Plain numbers in modules that mirror a width must follow it: ``in_channels``, ``split_sizes``, ``num_features``.

Which numbers those are is read off the recorded run, not off any architecture: an integer attribute with the name
of a width follows when it equals the old width of a channel axis that the module takes, makes or gives back, or
that a direct child does, and that axis shrank. Where axes of one old width shrank differently there are several
candidates; the likeliest is set first, and a forward run on tensors without data decides.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from bshub.errors import TraceError
from bshub.graph.channels import Ints
from bshub.graph.coupling import ChannelFlow
from bshub.graph.trace import record

# Names under which modules keep a width.
WIDTH_NAME = re.compile(
    r"(^|_)(ch|chs|chans?|channels?|dims?|features|planes|widths?|hidden_size|splits?|split_sizes?|chunks?)(_\w+)?$"
)
MAX_TRIALS = 64

Choices = dict[str, dict[str, list[Any]]]  # module → attribute → new values, the likeliest first


def mirrored_attributes(model: nn.Module, flow: ChannelFlow, gone: np.ndarray) -> Choices:
    """Candidates for the numbers that mirror a width.

    Args:
        model: The network, tensors already narrowed.
        flow: The channels.
        gone: Whether each variable leaves, ``[variables]``.

    Returns:
        Module → attribute → new values.
    """
    found: Choices = {}
    sizes = _Sizes(gone)
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.") or isinstance(module, (_ConvNd, _NormBase, nn.Linear)):
            continue  # described by their own tensors, or by numbers that mean space
        widths = {key: value for key, value in vars(module).items() if key[0] != "_" and WIDTH_NAME.search(key)}
        if not widths:
            continue
        children = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        taken = _resized(flow.widths_in, [name], sizes)
        given = _resized(flow.widths_out, [name], sizes)
        rest = [
            *_resized(flow.widths_inside, [name], sizes),
            *_resized(flow.widths_out, children[::-1], sizes),
            *_resized(flow.widths_in, children[::-1], sizes),
        ]
        if not (taken or given or rest):
            continue
        for attribute, value in widths.items():
            sides = [taken, given] if attribute.startswith("in") else [given, taken]
            candidates = _follow(value, [*sides[0], *sides[1], *rest])
            if candidates:
                found.setdefault(name, {})[attribute] = candidates
    info = _feature_info(model, flow, sizes)
    if info is not None:
        found.setdefault("", {})["feature_info"] = [info]
    hidden = _head_hidden_size(model)
    if hidden is not None:
        found.setdefault("", {})["head_hidden_size"] = [hidden]
    return found


def settle(model: nn.Module, choices: Choices, input_size: tuple[int, int, int]) -> None:
    """Set the attributes, in place; where the forward run fails, try the next candidate of the failing module.

    ``choices`` is left with the chosen value in front of each list. A run that cannot be made to work is left to
    the proof.
    """
    for name, attributes in choices.items():
        for attribute, values in attributes.items():
            setattr(model.get_submodule(name), attribute, values[0])
    left = {(m, a): len(v) - 1 for m, attributes in choices.items() for a, v in attributes.items() if len(v) > 1}
    for _ in range(MAX_TRIALS):
        if not any(left.values()):
            return
        try:
            record(model, input_size)
            return
        except TraceError as error:
            if not _next_candidate(model, choices, left, error.module or ""):
                return


def _next_candidate(model: nn.Module, choices: Choices, left: dict[tuple[str, str], int], failing: str) -> bool:
    """Advance one undecided attribute of the failing module or the nearest module around it."""
    parts = failing.split(".") if failing else []
    for depth in range(len(parts), -1, -1):
        holder = ".".join(parts[:depth])
        for (module, attribute), more in sorted(left.items()):
            if module != holder or not more:
                continue
            values = choices[module][attribute]
            values.append(values.pop(0))
            setattr(model.get_submodule(module), attribute, values[0])
            left[module, attribute] = more - 1
            return True
    return False


class _Sizes:
    """(old width, new width) of an axis; many axes share one array of variables, which is counted once."""

    def __init__(self, gone: np.ndarray) -> None:
        self._stays = ~gone
        self._known: dict[int, tuple[int, int]] = {}

    def __call__(self, slots: Ints) -> tuple[int, int]:
        if id(slots) not in self._known:
            self._known[id(slots)] = len(slots), int(np.count_nonzero(self._stays[slots]))
        return self._known[id(slots)]


def _resized(widths: dict[str, list[Ints]], modules: list[str], sizes: _Sizes) -> list[tuple[int, int]]:
    """The different sizes of the axes at these modules; an axis that kept its width counts too."""
    return list(dict.fromkeys(sizes(slots) for module in modules for slots in reversed(widths.get(module, []))))


def _follow(value: Any, known: list[tuple[int, int]]) -> list[Any]:
    """Candidates for a width or a short list of widths; empty where it can only stay."""
    if type(value) is int:
        found = list(dict.fromkeys(new for old, new in known if old == value))
        return found if found != [value] else []
    if not (isinstance(value, (list, tuple)) and 0 < len(value) <= 8 and all(type(item) is int for item in value)):
        return []
    options = [_follow(item, known) or [item] for item in value]
    lists = [type(value)(items) for items in itertools.islice(itertools.product(*options), MAX_TRIALS)]
    return lists if lists != [value] else []


def _feature_info(model: nn.Module, flow: ChannelFlow, sizes: _Sizes) -> list[dict[str, Any]] | None:
    """timm's list of feature levels, one record each with ``num_chs`` and ``module``."""
    info = getattr(model, "feature_info", None)
    if not (isinstance(info, list) and all(isinstance(record, dict) for record in info)):
        return None
    renewed = []
    for level in info:
        known = dict(_resized(flow.widths_out, [str(level.get("module"))], sizes))
        renewed.append({**level, "num_chs": known.get(level["num_chs"], level["num_chs"])})
    return renewed if renewed != info else None


def _head_hidden_size(model: nn.Module) -> int | None:
    """What timm promises of it: the width that the classifier takes, which may be another than ``num_features``."""
    if type(getattr(model, "head_hidden_size", None)) is not int or not hasattr(model, "get_classifier"):
        return None
    classifier: Any = model.get_classifier  # timm's, which nn.Module knows nothing of
    weight = getattr(classifier(), "weight", None)  # (classes, width) or (classes, width, 1, 1)
    return weight.shape[1] if isinstance(weight, Tensor) and weight.ndim in (2, 4) else None
