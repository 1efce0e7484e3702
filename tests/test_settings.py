"""Settings from TOML are read strictly, come back as they were written, and yield to what is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, bshub_command
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bshub.errors import BshubError, UsageError
from bshub.settings import Settings, find_settings, read_settings


def file(folder: Path, text: str | bytes, name: str = "bshub.toml") -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_settings(path)
    assert path.name in caught.value.message
    assert "\n" not in str(caught.value)
    return str(caught.value)


@hypothesis_settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Settings,
        score=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        mu=st.just("auto") | st.floats(-1e300, 1e300) | st.integers(-9, 9),
        budget=st.floats(0, 100),
        finetune_lr=st.floats(1e-9, 10),
        seed=st.integers(0, 2**63 - 1),
    )
)
def test_what_is_written_is_read_back_exactly(tmp_path: Path, settings: Settings) -> None:
    read = read_settings(file(tmp_path, settings.as_toml()))
    assert Settings(**read) == settings
    assert read == settings.as_dict()


def test_a_part_of_the_settings_will_do(tmp_path: Path) -> None:
    assert read_settings(file(tmp_path, "mu = 2.5\n")) == {"mu": 2.5}
    assert read_settings(file(tmp_path, "")) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mu = 1\nmu = 2", "not a file of settings"),
        ("[a]\n[a]", "not a file of settings"),
        ("mu = ", "not a file of settings"),
        (b"\xff", "not a file of settings"),
        ("mu = 2 # \x00", "not a file of settings"),
        ("a = " + "[" * 5000, "not a file of settings"),
        ("seed = " + "9" * 5000, "not a file of settings"),
        ("finetune-lr = 1", "did you mean finetune_lr?"),
        ("zzz = 1", "settings are "),
        ('"\\u001b" = 1', "is not a setting"),
        ("mu = nan", "mu must be a number or 'auto', not nan"),
        ("budget = -inf", "budget must be a number"),
        ("finetune_lr = nan", "finetune_lr must be a number"),
        ("mu = true", "mu must be"),
        ("mu = 'low'", "mu must be"),
        ("mu = 2024-01-01", "mu must be"),
        ("mu = [2]", "mu must be"),
        ("[mu]\nx = 1", "mu must be"),
        ("seed = 1.0", "seed must be a whole number"),
        ("batch_size = '32'", "batch_size must be a whole number"),
        ("score = 3", "score must be a name"),
        ("device = []", "device must be a name"),
    ],
)
def test_what_is_no_setting_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert said in refused(file(tmp_path, text))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.toml")
    refused(tmp_path)
    assert "larger than 1 MiB" in refused(file(tmp_path, "#" * (1 << 20) + "\n"))


@hypothesis_settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_any_bytes_are_settings_or_one_kind_of_error(tmp_path: Path, data: bytes) -> None:
    try:
        Settings(**read_settings(file(tmp_path, data)))
    except BshubError as error:
        assert str(error).isprintable()


def test_a_project_speaks_of_bshub_in_its_own_table(tmp_path: Path) -> None:
    project = file(tmp_path, "[project]\nname = 'x'\n[tool.bshub]\nmu = 3\n", "pyproject.toml")
    assert read_settings(project) == {"mu": 3}
    assert "no table [tool.bshub]" in refused(file(tmp_path, "[tool.ruff]\n", "pyproject.toml"))
    assert "not a table" in refused(file(tmp_path, "[tool]\nbshub = 3\n", "pyproject.toml"))
    refused(file(tmp_path, "tool = 3\n", "pyproject.toml"))


def test_a_folders_own_file_is_found(tmp_path: Path) -> None:
    assert find_settings(tmp_path) is None
    project = file(tmp_path, "[tool.ruff]\n", "pyproject.toml")
    assert find_settings(tmp_path) is None
    file(tmp_path, "[tool.bshub]\n", "pyproject.toml")
    assert find_settings(tmp_path) == project
    assert find_settings(file(tmp_path, "").parent) == tmp_path / "bshub.toml"


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[[[", b"no toml at all"])
def test_somebody_elses_broken_project_is_no_concern(tmp_path: Path, data: bytes) -> None:
    file(tmp_path, data, "pyproject.toml")
    assert find_settings(tmp_path) is None


def test_a_broken_project_that_names_bshub_is(tmp_path: Path) -> None:
    file(tmp_path, b"[tool.bshub]\nmu = ", "pyproject.toml")
    with pytest.raises(UsageError, match="is not TOML"):
        find_settings(tmp_path)


def planned(*options: object) -> dict[str, Any]:
    result = bshub_command("scan", DEMO / "model", "--json", *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_command_takes_settings_from_its_folder_and_options_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "settings_file" not in planned("--mu", 4)
    file(tmp_path, "mu = 2.5\nscore = 'clp'\nfinetune_epochs = 3\n")
    found = planned()
    assert (found["diagnosis"]["threshold"]["mu"], found["diagnosis"]["score"]) == (2.5, "clp")
    assert found["settings_file"] == "bshub.toml"
    assert planned("--mu", 4)["diagnosis"]["threshold"]["mu"] == 4
    other = file(tmp_path, "mu = 3\n", "other.toml")
    found = planned("--config", other)
    assert (found["diagnosis"]["threshold"]["mu"], found["diagnosis"]["score"]) == (3, "lipschitz")


def test_bad_settings_end_the_command_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file(tmp_path, "mu = nan\n")
    for command in ("sanitize", "scan", "evaluate"):
        result = bshub_command(command, "./nowhere")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("bshub: bshub.toml: mu must be a number or 'auto', not nan\n       correct it")
        assert bshub_command(command, "--help").exit_code == 0
