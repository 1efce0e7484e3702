"""The documentation is built offline, strictly, and asks nobody for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("mkdocs", reason="pip install 'bshub[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    dead = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, **dead}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//[^\s>]+", text) == [], page.name
        assert re.findall(r"<link\b(?=[^>]*stylesheet)[^>]*href=\"?(?:https?:)?//[^\s>]+", text) == [], page.name
        assert "fonts.googleapis" not in text
        assert "google-analytics" not in text
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")) == []


def test_the_api_pages_show_signatures_and_what_is_raised(site: Path) -> None:
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    for piece in ("sanitize", "SanitizeResult", "InconclusiveError", "loader", "export_onnx"):
        assert piece in page
    assert "[n, c, h, w]" in page


def test_the_page_of_each_command_lists_its_options_as_the_command_does(site: Path) -> None:
    from bshub_cli.main import app

    for command in app.registered_commands:
        assert command.callback is not None
        name = command.callback.__name__
        page = (site / "how-to" / f"{name}.html").read_text(encoding="utf-8")
        assert "<!-- help" not in page
        assert "--json" in page, name


def test_links_to_the_code_lead_to_copies_of_it(site: Path) -> None:
    page = (site / "design.html").read_text(encoding="utf-8")
    links = re.findall(r"href=\"?(source/[^\s\">]+)", page)
    assert links
    for link in links:
        assert (site / link).is_file()
        original = ROOT / link.removeprefix("source/").removesuffix(".txt")
        assert (site / link).read_text(encoding="utf-8") == original.read_text(encoding="utf-8")
