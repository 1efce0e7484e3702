"""What is installed is what is here, from pinned and hashed packages."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCKS = ("requirements.lock", "requirements-uv.lock")


def entries(name: str) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Package → (requirement, hashes) of each of its lines."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            head, *hashes = re.split(r"\s+--hash=", line.strip())
            requirement = Requirement(head)
            found.setdefault(canonicalize_name(requirement.name), []).append((requirement, hashes))
    return found


def test_the_listed_packages_are_the_folders_with_code() -> None:
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("bshub/**/__init__.py")}
    code = {path.parent.relative_to(ROOT) for path in ROOT.glob("bshub/**/*.py")}
    assert folders == code, "a folder of code without __init__.py is not installed"
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted([".".join(folder.parts) for folder in folders] + ["bshub_cli"])
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"bshub_cli": "cli"}
    assert (ROOT / "cli" / "__init__.py").is_file()


def test_promised_package_data_exists() -> None:
    assert PROJECT["tool"]["setuptools"]["package-data"]["bshub"] == ["py.typed"]
    if "Typing :: Typed" in PROJECT["project"]["classifiers"]:
        assert (ROOT / "bshub" / "py.typed").is_file()


def test_the_version_is_stated_once_the_same() -> None:
    import bshub

    assert bshub.__version__ == PROJECT["project"]["version"]


def test_every_exported_name_is_there() -> None:
    import bshub

    assert {name for name in bshub.__all__ if not hasattr(bshub, name)} == set()
    with pytest.raises(AttributeError):
        _ = bshub.nothing


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_is_pinned_and_hashed_and_comes_from_the_index(name: str) -> None:
    assert "://" not in (ROOT / name).read_text(encoding="utf-8")
    for package, lines in entries(name).items():
        for requirement, hashes in lines:
            assert requirement.url is None
            assert [s.operator for s in requirement.specifier] == ["=="], package
            assert not next(iter(requirement.specifier)).version.endswith("*")
            assert hashes, package
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), package


def test_every_requirement_is_locked_within_its_bounds() -> None:
    locked = entries("requirements.lock")
    project = PROJECT["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(text)
        versions = [next(iter(pin.specifier)).version for pin, _ in locked[canonicalize_name(wanted.name)]]
        fits = [wanted.specifier.contains(version, prereleases=True) for version in versions]
        # a requirement for some systems only has a pin of its own beside those for the others
        assert fits and (any(fits) if wanted.marker else all(fits)), text


def test_torch_and_torchvision_are_pinned_as_the_pair_they_were_compiled_as() -> None:
    locked = entries("requirements.lock")
    (torch,), (vision,) = locked["torch"], locked["torchvision"]
    pinned = next(iter(torch[0].specifier)).version
    if metadata.version("torchvision").partition("+")[0] != next(iter(vision[0].specifier)).version:
        pytest.skip("another torchvision than the locked one is installed")
    needs = [Requirement(text) for text in metadata.requires("torchvision") or []]
    (wanted,) = [need for need in needs if need.name == "torch"]
    assert wanted.specifier.contains(pinned)
    from torchvision import extension

    assert extension._has_ops(), "torchvision's compiled part does not load beside this torch"
