"""Every public function says what it takes, gives and raises; the API pages are generated from it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from conftest import ROOT

import bshub
from bshub.evaluation.attacks.registry import ATTACKS
from bshub.evaluation.defenses.registry import DEFENSES
from bshub.graph.rules import OP_RULES
from bshub.repair.finetune import REPAIRS
from bshub.scoring.suspiciousness import SCORES

SECTION = r"^ *{}:\n((?: {{4,}}.*\n|\n)+)"
PAGES = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))


def unwrapped(thing: Any) -> Any:
    return thing.func if isinstance(thing, partial) else thing


def exported() -> Iterator[tuple[str, Any]]:
    """The names of the package."""
    for name in bshub.__all__:
        if name != "__version__":
            yield name, getattr(bshub, name)


def registered() -> Iterator[tuple[str, Callable[..., Any]]]:
    """What stands in the registries."""
    yield from ((f"score {name}", score.function) for name, score in SCORES.items())
    yield from ((f"repair {name}", way.loss) for name, way in REPAIRS.items())
    yield from ((f"attack {name}", unwrapped(attack)) for name, attack in ATTACKS.items())
    yield from ((f"defense {name}", defense) for name, defense in DEFENSES.items())


def on_pages() -> Iterator[tuple[str, Any]]:
    """Public functions of the modules that the API pages show, and functions that they show alone."""
    from importlib import import_module

    for path in re.findall(r"^::: ([\w.]+)", PAGES, re.MULTILINE):
        try:
            module = import_module(path)
        except ModuleNotFoundError:
            head, _, name = path.rpartition(".")
            yield path, getattr(import_module(head), name)
            continue
        for name, value in vars(module).items():
            if not name.startswith("_") and inspect.isfunction(value) and value.__module__ == path:
                yield f"{path}.{name}", value


def section(text: str, title: str) -> str:
    found = re.search(SECTION.format(title), text + "\n", re.MULTILINE)
    return found[1] if found else ""


def raised(function: Callable[..., Any]) -> set[str]:
    """Errors of ours that a function raises itself."""
    import textwrap

    names = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.endswith("Error"):
            names.add(call.func.id)
    return names


def faults(name: str, thing: Any) -> Iterator[str]:
    text = inspect.getdoc(thing) or ""
    if not text:
        yield f"{name} has no docstring"
    elif inspect.isclass(thing):
        fields = [key for key in getattr(thing, "__dataclass_fields__", {}) if not key.startswith("_")]
        told = section(text, "Attributes") + section(text, "Args")
        missing = [key for key in fields if not re.search(rf"\b{key}\b", told)]
        if missing:
            yield f"{name}: fields {missing} are not described"
    else:
        signature = inspect.signature(thing)
        told = section(text, "Args")
        missing = [key for key in signature.parameters if not re.search(rf"^ *\**{key}: \S", told, re.MULTILINE)]
        if missing:
            yield f"{name}: arguments {missing} are not described"
        if signature.return_annotation not in (None, "None") and not section(text, "Returns"):
            yield f"{name}: what it returns is not described"
        told = section(text, "Raises")
        silent = sorted(error for error in raised(thing) if error not in told and "BshubError" not in told)
        if silent:
            yield f"{name} raises {silent} and does not say so"


NAMED = {**dict(exported()), **dict(registered()), **dict(on_pages())}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_public_name_is_described(name: str) -> None:
    assert list(faults(name, unwrapped(NAMED[name]))) == []


@pytest.mark.parametrize("name", sorted({name for name, _ in registered()} - {"attack none"}))  # the clean control
def test_a_score_loss_attack_or_defense_states_its_equation_or_source_and_its_shapes(name: str) -> None:
    function = dict(registered())[name]
    text = f"{inspect.getdoc(function)}\n{inspect.getmodule(function).__doc__}"  # type: ignore[union-attr]
    assert re.search(r"arXiv|section|equation|reconstruction|\blog p|[√·‖Σ∂²Π]", text, re.IGNORECASE), (
        "no source, no equation"
    )
    if name.startswith(("score", "repair")):
        assert re.search(r"\[out_channels\]|\(n, classes\)|\[n\]", text), "no shape"


def test_every_rule_of_an_operation_is_described() -> None:
    assert {
        name for name, rule in OP_RULES.items() if not (inspect.getdoc(unwrapped(rule)) or name == "native_dropout")
    } == set()


def test_the_pages_show_every_exported_name_and_every_registry() -> None:
    for name, thing in exported():
        place = f"{thing.__module__}.{thing.__qualname__}"
        assert place in PAGES or f"::: {thing.__module__}\n" in PAGES, f"{name} is on no page"
    for name, function in registered():
        assert f"::: {function.__module__}\n" in PAGES, f"{name} is on no page"


def test_a_missing_description_would_be_found() -> None:
    def undescribed(model: int, budget: float) -> int:
        """Do it.

        Args:
            model: A number.
        """
        from bshub.errors import UsageError

        raise UsageError("no", hint="never")

    assert len(list(faults("x", undescribed))) == 3
