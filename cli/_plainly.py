"""Words of a command line → arguments of a command, where nothing about them needs explaining.

The options are read off the command's own signature, so that there is one definition of them. Whatever is not plain
(help, an unknown option, a number that is none, a word that is missing) is answered with None: typer then parses the
same words and says what is wrong. Typer itself builds a pydantic schema of every option of every command first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

_KINDS = (str, Path, int, float, bool)


def parse(command: Callable[..., None], words: Sequence[str]) -> dict[str, Any] | None:
    """The arguments that typer would make of these words, without the defaults; None: let typer look.

    Args:
        command: A function annotated for typer.
        words: Of the command line, after the command's name.
    """
    hints = get_type_hints(command, include_extras=True)
    options: dict[str, tuple[str, type, OptionInfo]] = {}
    places: list[tuple[str, type, ArgumentInfo]] = []
    for name in inspect.signature(command).parameters:
        kind, info = _kind(hints[name])
        if kind not in _KINDS or info is None or info.callback or info.parser or info.envvar:
            return None
        if isinstance(info, ArgumentInfo):
            places.append((name, kind, info))
        else:
            names = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
            options |= dict.fromkeys(names or [f"--{name.replace('_', '-')}"], (name, kind, info))
    told: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("-"):
            written, given, text = word.partition("=")
            if written not in options or (given and not written.startswith("--")):
                return None
            name, kind, info = options[written]
            if kind is bool:
                value: Any = None if given else True
            else:
                value = _value(text if given else rest.pop(0) if rest else "", kind, info)
        elif places:
            name, kind, info = places.pop(0)  # type: ignore[assignment]
            value = _value(word, kind, info)
        else:
            return None
        if value is None or name in told:
            return None
        told[name] = value
    needed = {n for n, p in inspect.signature(command).parameters.items() if p.default is inspect.Parameter.empty}
    return told if needed <= told.keys() else None


def call(command: Callable[..., None], told: dict[str, Any]) -> int:
    """Run a command; its exit code."""
    try:
        command(**told)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _kind(hint: Any) -> tuple[Any, OptionInfo | ArgumentInfo | None]:
    """``Annotated[Path | None, Option(…)]`` → ``Path`` and the option."""
    told, *notes = get_args(hint) or (hint,)
    info = notes[0] if len(notes) == 1 and isinstance(notes[0], (OptionInfo, ArgumentInfo)) else None
    kinds = [kind for kind in get_args(told) or (told,) if kind is not NoneType]
    return (kinds[0] if len(kinds) == 1 else None), info


def _value(text: str, kind: type, info: OptionInfo | ArgumentInfo) -> Any:
    """A word as a value; None where typer might see it in another way."""
    if not text or text.startswith("-") or not text.isprintable():
        return None
    if kind in (str, Path):
        return kind(text)
    if not (text.isascii() and text.isdecimal()) or kind is bool:
        return None
    number = kind(text)
    low, high = info.min, info.max
    return number if (low is None or number >= low) and (high is None or number <= high) else None
