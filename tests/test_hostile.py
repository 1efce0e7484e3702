"""The 65 bad inputs and faults of ``docs/hostile-inputs.md``: what must come of each; no output is touched."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad import CASES, NUMBERS, table
from bad.bench import TOKEN, Bench, Case, contents, open_bench
from conftest import ROOT

DOCS = ROOT / "docs" / "hostile-inputs.md"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.chdir(tmp_path)  # no bshub.toml but the bench's own
    yield from open_bench(tmp_path / "bench", monkeypatch)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_what_is_bad_comes_to_what_is_promised(case: Case, bench: Bench) -> None:
    outcome = case.run(bench)
    assert outcome.code == case.code, outcome.text
    assert case.says in outcome.text.replace("\n       ", " ")
    if case.error is not None:
        assert type(outcome.error) is case.error
        assert case.says in str(outcome.error)
        assert str(outcome.error).isprintable()
        assert outcome.error.exit_code == case.code
        assert outcome.error.hint, "no next command"
        assert "weights_only" not in outcome.text  # torch's advice to turn the guard off
    if case.number != 64:
        assert "Traceback" not in outcome.text
        assert "bshub: unexpected" not in outcome.text
    assert TOKEN not in outcome.text
    assert contents(bench.root / "outputs") == bench.before


def test_every_number_of_the_list_has_a_case_and_every_case_its_own_id() -> None:
    assert {case.number for case in CASES} == set(NUMBERS)
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.skipif(sys.platform != "linux", reason="some cases are of one system")
def test_the_docs_hold_the_table_of_the_cases() -> None:
    assert table() in DOCS.read_text(encoding="utf-8"), "run: cd tests && ../.venv/bin/python -m bad"
