"""What is installed is what is here, from pinned and hashed packages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

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
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(line for extra in extras for line in extra)]:
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


@pytest.mark.slow
def test_wheel_and_sdist_are_built_and_the_wheel_works_in_a_clean_environment(tmp_path: Path) -> None:
    """No network: the libraries of this environment are lent to the clean one, bshub's editable install is not."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("bshub", "cli"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run = {"capture_output": True, "text": True, "timeout": 600}
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(tree)], **run
    )  # type: ignore[call-overload]
    assert built.returncode == 0, built.stderr + built.stdout
    (wheel,), (sdist,) = (list((tmp_path / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"bshub/py.typed", "bshub_cli/main.py"} <= names
    assert not [name for name in names if name.split("/")[0] in ("cli", "tests", "examples", "docs")]
    wanted = {f"bshub/{path.relative_to(ROOT / 'bshub').as_posix()}" for path in (ROOT / "bshub").rglob("*.*")}
    assert {name for name in wanted - names if "__pycache__" not in name} == set(), "files that the wheel lacks"
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "bshub/__init__.py", "cli/main.py"} <= inside

    place = tmp_path / "clean"
    venv.create(place, with_pip=False)
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = subprocess.run([str(python), "-c", "import site; print(site.getsitepackages()[-1])"], **run)  # type: ignore[call-overload]
    packages = Path(site.stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    lent = [entry for entry in site_folders() if Path(entry).is_dir()]
    # a .pth file of a .pth folder is not read: the editable install of this checkout stays outside
    (packages / "lent.pth").write_text("\n".join(lent))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    code = "import bshub, bshub_cli; print(bshub.__file__, bshub_cli.__file__); bshub.sanitize"
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, env=environment, **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(place)) for path in done.stdout.split())
    script = "import importlib.metadata as m, sys; (s,) = [s for s in m.distribution('bshub').entry_points]; s.load()()"
    done = subprocess.run(
        [str(python), "-c", script, "scan", str(ROOT / "examples" / "demo" / "model"), "--json"],
        cwd=tmp_path, env=environment, **run,
    )  # type: ignore[call-overload]  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["diagnosis"]["filters"] == 1864


def site_folders() -> list[str]:
    """Where this environment's libraries lie."""
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
