"""The documentation is built offline, strictly, and asks nobody for anything."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import Browser, find_chromium
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


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *_: object) -> None:
        """Keep the test's stderr clean."""


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
def test_a_visitor_reads_and_searches_and_no_other_server_hears_of_it(site: Path) -> None:
    chromium = find_chromium()
    assert chromium
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    home = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        with Browser(chromium) as browser:
            browser.look(1280, 900)
            for page in ("index", "api/index", "results", "how-to/sanitize"):
                browser.call("Page.navigate", url=f"{home}/{page}.html")
                browser.wait("document.readyState === 'complete' && document.querySelector('h1')")
                assert browser.run("[...document.images].every(it => it.complete && it.naturalWidth)")
                assert browser.run("document.documentElement.scrollWidth <= innerWidth")
            browser.run("document.querySelector('.md-search__input').focus()")
            browser.call("Input.insertText", text="suspiciousness")
            browser.wait("document.querySelectorAll('.md-search-result__item').length > 0")
            assert browser.errors == []
            assert [url for url in browser.requests if not url.startswith((home, "blob:"))] == []
    finally:
        server.shutdown()
        server.server_close()
