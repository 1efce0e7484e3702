"""What `mkdocs build` does beside reading the pages: options of commands, and links that leave this folder.

The pages are read on disk as well, so they link to the code as files do: ``../bshub/graph/rules.py``. On the site such
a file lies under ``source/``. ``<!-- help: scan -->`` becomes what ``bshub scan --help`` prints.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\]\(((?:\.\./)+(?!\.)[^)#\s]+)")
_HELP = re.compile(r"<!-- help: (\w+) -->")
_TARGETS = re.compile(r"(?:bshub|cli|examples|tests)/[\w./-]+|[\w.-]+\.(?:md|toml|yml|yaml|lock)|Makefile|LICENSE")


def _outside(page: str, link: str) -> str | None:
    """The path from the root of a file outside docs/ that a page links to, if it is one."""
    path = os.path.normpath(os.path.join("docs", os.path.dirname(page), link)).replace(os.sep, "/")
    inside = path.startswith(("docs/", "..")) or not _TARGETS.fullmatch(path)
    return path if not inside and (ROOT / path).is_file() else None


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside docs/ that a page links to."""
    for page in list(files.documentation_pages()):
        for link in _LINK.findall(page.content_string):
            if (path := _outside(page.src_uri, link)) and not files.get_file_from_path(_place(path)):
                files.append(File.generated(config, _place(path), content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point such links at the copies, and print the options."""

    def moved(match: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, match[1])
        up = "../" * page.file.src_uri.count("/")
        return f"]({up}{_place(path)}" if path else match[0]

    return _HELP.sub(lambda match: _options(match[1]), _LINK.sub(moved, markdown))


def _place(path: str) -> str:
    return f"source/{path}.txt"


def _options(command: str) -> str:
    from typer.testing import CliRunner

    from bshub_cli.main import app

    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).stdout
    return f"```text\n{text.strip()}\n```"
