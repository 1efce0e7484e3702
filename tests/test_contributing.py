"""The files that a contributor meets are sound."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_is_of_this_version_and_has_what_the_format_asks() -> None:
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cff)
    assert cff["cff-version"] == "1.2.0"
    assert (cff["version"], cff["license"]) == (PROJECT["version"], PROJECT["license"])
    assert all({"name", "alias"} & set(author) or "family-names" in author for author in cff["authors"])
    for reference in cff["references"]:
        assert {"type", "title", "authors"} <= set(reference)


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_an_issue_template_is_a_form(path) -> None:  # type: ignore[no-untyped-def]
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert "blank_issues_enabled" in form
        return
    assert {"name", "description", "body"} <= set(form)
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert part["attributes"].get("label")
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))


def test_the_pre_commit_hooks_are_the_tools_of_make_lint() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-config", str(ROOT / ".pre-commit-config.yaml")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = {hook["entry"].split()[0].rpartition("/")[2] for repo in config["repos"] for hook in repo["hooks"]}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint
    assert entries == set(re.findall(r"\$\(BIN\)/([\w-]+)", lint[1]))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md"])
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert link.startswith("http") or (path.parent / link).exists(), link
