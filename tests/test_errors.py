"""One tree of errors: each says its cause and what to do next, in one line of printable text without secrets."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from bshub import errors
from bshub.errors import BshubError, printable, redacted

TREE = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, BshubError)}
SOURCES = [path for folder in ("bshub", "cli") for path in sorted((ROOT / folder).rglob("*.py"))]


def calls(path: Path) -> list[ast.Call]:
    """Every place of a file that makes an error of the tree."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") in TREE]


def test_every_error_that_is_made_says_what_to_do_next() -> None:
    made = {f"{path.relative_to(ROOT)}:{call.lineno}": call for path in SOURCES for call in calls(path)}
    assert len(made) > 200
    silent = [place for place, call in made.items() if not any(key.arg == "hint" for key in call.keywords)]
    assert silent == []


def test_nothing_else_is_raised_for_a_user_to_read() -> None:
    """What is raised outside the tree is a bug's own message, caught where it is raised, or the library's interface."""
    kinds = {"Exception", "BaseException", "SystemExit", "OSError", "IOError"}
    raised = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and getattr(node.exc.func, "id", "") in kinds
    }
    assert raised == set()


@pytest.mark.parametrize("name", sorted(TREE))
def test_every_kind_has_an_exit_code_of_the_table(name: str) -> None:
    kind = getattr(errors, name)
    assert kind.exit_code in (1, 2, 3)
    assert name in (errors.__doc__ or "")
    assert name in errors.__all__


@given(st.text(), st.text())
def test_an_error_is_one_line_of_printable_text(message: str, hint: str) -> None:
    error = BshubError(message, hint=hint)
    assert str(error).isprintable()
    assert len(str(error)) <= 2 * 400 + 3


@given(st.text(), st.integers(1, 50))
def test_what_is_printable_keeps_plain_text_and_its_length(text: str, limit: int) -> None:
    assert printable(text, limit).isprintable()
    assert len(printable(text, limit)) <= limit
    if text.isprintable() and len(text) <= limit:
        assert printable(text, limit) == text


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnopqrstuvwxyz",
        "Bearer abc.def",
        "https://user:pass@host/",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOjF9.x",
    ],
)
def test_what_looks_like_a_secret_is_struck_out(secret: str) -> None:
    shown = redacted(f"before {secret} after")
    assert "***" in shown and shown.startswith("before") and shown.endswith("after")
    for part in ("abcdefghijklmnop", "abc.def", "user:pass", "hbGciOi"):
        assert part not in shown


def test_the_values_of_secret_variables_are_struck_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "swordfish-1234")
    monkeypatch.setenv("COLOUR", "turquoise")
    assert redacted("swordfish-1234 turquoise") == "*** turquoise"
