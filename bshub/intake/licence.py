"""The licence that a model's card states, for models whose configuration states none.

Only two lines of the card's front matter are looked for; nothing of it is parsed as YAML, whose aliases can grow
without bound.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from bshub.errors import ModelReferenceError
from bshub.intake.hub import fetch

CARD = "README.md"
_BYTES = 1 << 16
_FRONT = re.compile(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
_LINE = r"^{key}:[ \t]*(?P<quote>['\"]?)(?P<value>[\w.+][\w.+ -]{{0,99}}?)(?P=quote)[ \t]*(?:#.*)?$"


def stated_licence(text: str) -> str | None:
    """The licence in the front matter of a card.

    Args:
        text: The card.

    Returns:
        Its name on the Hub; for ``other`` the name that the card gives it; None where none is stated in one word.
    """
    front = _FRONT.match(text.replace("\r\n", "\n"))
    found = {
        key: match["value"]
        for key in ("license", "license_name")
        if front and (match := re.search(_LINE.format(key=key), front[1], re.MULTILINE | re.ASCII))
    }
    return found.get("license_name", "other") if found.get("license") == "other" else found.get("license")


def licence_beside(weights: Path) -> str | None:
    """The licence that the card in a folder states."""
    card = weights.parent / CARD
    with suppress(OSError):
        if card.is_file():  # a pipe would never end
            with open(card, "rb") as file:
                return stated_licence(file.read(_BYTES).decode("utf-8", "replace"))
    return None


def licence_on_hub(repository: str, revision: str | None) -> str | None:
    """The licence that a repository's card states; a repository without a card states none."""
    with suppress(ModelReferenceError):
        return licence_beside(fetch(repository, CARD, revision))
    return None
