"""Names of classes → outputs of the model: by name, by index, or by order; and which of them decided."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bshub.errors import ImageDataError, UsageError, printable

MAX_CLASSES = 1_000_000
_MAX_BYTES = 64 << 20
_WORDNET = re.compile(r"n\d{8}")
_BY_NAME = "name them after the model's labels or their indices, or give the model's order with --classes FILE"


def read_classes(path: Path) -> tuple[str, ...]:
    """Read a class file: the name of each output of the model, in order.

    Args:
        path: One name per line, or a JSON list of names; UTF-8.

    Returns:
        The names. One may occur twice (ImageNet has two cranes); a folder of such a name is refused later.

    Raises:
        UsageError: It cannot be read, or is neither.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES >> 20} MiB")
        text = data.decode("utf-8-sig")
        names: Any = json.loads(text) if text.lstrip().startswith("[") else text.rstrip().splitlines()
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} is not a class file: {reason}", hint="write one name per line") from None
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise UsageError(f"{path} is not a class file: a name is empty or no text", hint="write one name per line")
    if not 2 <= len(names) <= MAX_CLASSES:
        raise UsageError(f"{path} names {len(names)} classes", hint="write the name of each output, one per line")
    return tuple(name.strip().encode("utf-8", "replace").decode("utf-8") for name in names)


def match_names(
    names: Sequence[str],
    num_classes: int,
    labels: Sequence[str] | None,
    *,
    what: str,
    whose: str = "the model's labels",
) -> tuple[list[int], str]:
    """Find the output that each class name means.

    Names are matched to ``labels`` where there are any (a subset will do), else to ImageNet's where the model has its
    thousand classes, else read as indices where all are numbers, else taken in alphabetical order where there are as
    many as classes.

    Args:
        names: Distinct names, sorted.
        num_classes: Number of outputs of the model.
        labels: Name of each output, if known.
        what: What carries the names, for messages: ``class folders``.
        whose: Where ``labels`` come from, for messages.

    Returns:
        The index of each name, and the rule that decided, in words.

    Raises:
        ImageDataError: None of the rules fits.
    """
    if labels is not None and len(labels) != num_classes:
        labels = None
    known = [(labels, whose)] if labels is not None else []
    known += _imagenet(names, num_classes, labels)
    for candidates, source in known:
        found = _find(names, candidates)
        if found is not None:
            return found, f"{what} matched to {source}"
    if all(re.fullmatch(r"\d{1,9}", name) for name in names):
        indices = [int(name) for name in names]
        if len(set(indices)) == len(indices) and max(indices) < num_classes:
            return indices, f"{what} read as label indices"
        raise ImageDataError(
            f"{what} {_some(names)} are not indices of {num_classes} classes", hint="indices begin at 0, one each"
        )
    if labels is not None:
        index = _index(labels)
        odd = next(name for name in names if len(index.get(_plain(name).casefold(), ())) != 1)
        twice = len(index.get(_plain(odd).casefold(), ())) > 1
        raise ImageDataError(
            f"{len(names)} {what}: {printable(odd, 40)!r} is {'the name of several' if twice else 'none'} of {whose} "
            f"({_some(labels)})",
            hint=f"name the indices instead: {index[_plain(odd).casefold()]}" if twice else _BY_NAME,
        )
    if len(names) == num_classes:
        return list(range(num_classes)), f"{what} in alphabetical order"
    raise ImageDataError(
        f"{len(names)} {what} ({_some(names)}) do not fit a model with {num_classes} classes", hint=_BY_NAME
    )


def _find(names: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """Index of the label of each name: exact, or else the only one that differs in case alone; None if one has none."""
    exact = _index(labels, fold=False)
    folded = _index(labels)
    found = []
    for name in names:
        matches = exact.get(_plain(name)) or folded.get(_plain(name).casefold()) or []
        if len(matches) != 1:
            return None
        found.append(matches[0])
    return found


def _index(labels: Sequence[str], fold: bool = True) -> dict[str, list[int]]:
    index: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        index.setdefault(_plain(label).casefold() if fold else _plain(label), []).append(place)
    return index


def _imagenet(names: Sequence[str], num_classes: int, labels: Sequence[str] | None) -> list[tuple[Sequence[str], str]]:
    """ImageNet's own names, for a model that has its classes: torchvision knows words alone, timm WordNet ids."""
    if num_classes != 1000:
        return []
    ids, words = _imagenet_names()
    if labels is not None and tuple(labels) != ids:
        agreeing = sum(_plain(label).casefold() == word.casefold() for label, word in zip(labels, words, strict=True))
        if agreeing < 900:  # torchvision's list differs from timm's in a few words
            return []
    by_id = all(_WORDNET.fullmatch(name) for name in names)
    return [(ids, "ImageNet's WordNet ids") if by_id else (words, "ImageNet's class names")]


@cache
def _imagenet_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(info.label_names()), tuple(text.partition(",")[0] for text in info.label_descriptions())


def twins(names: Sequence[str]) -> tuple[str, str] | None:
    """The first two names that differ only in case or Unicode form, which some file systems cannot keep apart."""
    seen: dict[str, str] = {}
    for name in names:
        key = _plain(name).casefold()
        if key in seen:
            return seen[key], name
        seen[key] = name
    return None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name, 40) for name in names[:3])
    return shown + (", …" if len(names) > 3 else "")
