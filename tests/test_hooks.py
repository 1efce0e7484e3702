"""The hooks of examples/hooks, each run as it is shipped: what passes goes through, what does not is stopped."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from sarif_schema import check_sarif

from bshub.files import MANIFEST
from bshub.release.artifact import write_report

HOOKS = ROOT / "examples" / "hooks"
BIN = Path(sys.executable).parent
RATE = {"percent": 90.0, "low": 80.0, "high": 95.0, "n": 100}

pytestmark = pytest.mark.skipif(not shutil.which("bash") or not shutil.which("git"), reason="needs bash and git")


@pytest.fixture
def environment(child_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Our own commands first on the PATH; git and pre-commit keep to themselves."""
    return {
        **child_environment,
        "PATH": f"{BIN}{os.pathsep}{child_environment['PATH']}",
        "PRE_COMMIT_HOME": str(tmp_path / "pre-commit"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
    }


def little_artifact(place: Path) -> Path:
    """A folder whose receipt states what the default policy asks; the gate at this depth opens no weights."""
    place.mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "README.md"):
        (place / name).write_text(name)
    write_report(
        place,
        {
            "settings": {"method": "bshub"},
            "counts": {"flagged": 1},
            "proof": {"holds": True},
            "versions": {"bshub": "0.1.0"},
            "evaluation": {when: {"accuracy": RATE} for when in ("before", "after")},
        },
    )
    return place


def run(environment: dict[str, str], folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_deploy_moves_what_passes_and_leaves_the_old_where_it_does_not(
    environment: dict[str, str], tmp_path: Path
) -> None:
    made, served = little_artifact(tmp_path / "made"), tmp_path / "served"
    done = run(environment, tmp_path, HOOKS / "deploy.sh", made, served)
    assert done.returncode == 0, done.stderr
    assert (served / "model.safetensors").read_text() == "model.safetensors"
    (made / "model.safetensors").write_text("backdoored")
    done = run(environment, tmp_path, HOOKS / "deploy.sh", made, served)
    assert done.returncode == 1
    assert "file-changed" in done.stdout and "→" in done.stdout and "not deployed" in done.stderr
    assert (served / "model.safetensors").read_text() == "model.safetensors"
    assert {path.name for path in tmp_path.iterdir()} == {"made", "served"}


@pytest.fixture
def fetched(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A download that copies folders of this machine, where KServe's would fetch addresses."""
    fetch = tmp_path / "fetch.sh"
    fetch.write_text('#!/bin/sh\nset -e\nwhile [ $# -gt 0 ]; do mkdir -p "$2"; cp -R "$1"/. "$2"; shift 2; done\n')
    fetch.chmod(0o755)
    return {**environment, "BSHUB_DOWNLOAD": str(fetch)}


def test_the_storage_initializer_stops_the_pod_and_empties_the_volume(fetched: dict[str, str], tmp_path: Path) -> None:
    made, volume, hook = little_artifact(tmp_path / "made"), tmp_path / "volume", HOOKS / "kserve-initializer.sh"
    assert run(fetched, tmp_path, hook, made, volume).returncode == 0
    assert (volume / "model.safetensors").is_file()
    (made / "README.md").unlink()
    shutil.rmtree(volume)
    done = run(fetched, tmp_path, hook, made, volume)
    assert done.returncode == 1
    assert "file-missing" in done.stdout and "→" in done.stdout and "was refused" in done.stderr
    assert list(volume.iterdir()) == []
    assert "could not be fetched" in run(fetched, tmp_path, hook, tmp_path / "none", volume).stderr
    assert run(fetched, tmp_path, hook, made).returncode == 2


def test_of_several_volumes_one_that_is_refused_empties_all(fetched: dict[str, str], tmp_path: Path) -> None:
    good, bad, hook = little_artifact(tmp_path / "good"), little_artifact(tmp_path / "bad"), "kserve-initializer.sh"
    one, two = tmp_path / "volume 1", tmp_path / "volume 2"
    assert run(fetched, tmp_path, HOOKS / hook, good, one, bad, two).returncode == 0
    (bad / "pytorch_model.bin").write_text("x")
    done = run(fetched, tmp_path, HOOKS / hook, good, one, bad, two)
    assert done.returncode == 1 and f"{bad} was refused" in done.stderr
    assert [*one.iterdir(), *two.iterdir()] == []


def test_the_storage_initializer_asks_for_the_policy_and_the_key(fetched: dict[str, str], tmp_path: Path) -> None:
    made, volume = little_artifact(tmp_path / "made"), tmp_path / "volume"
    (tmp_path / "policy.toml").write_text("min_accuracy = 99\n")
    told = {**fetched, "BSHUB_POLICY": "policy.toml"}
    done = run(told, tmp_path, HOOKS / "kserve-initializer.sh", made, volume)
    assert done.returncode == 1 and "at least 99 %" in done.stdout
    done = run({**fetched, "BSHUB_KEY": "none.pem"}, tmp_path, HOOKS / "kserve-initializer.sh", made, volume)
    assert done.returncode != 0 and list(volume.iterdir()) == []


def test_the_resource_for_kserve_runs_the_script_that_the_image_holds() -> None:
    resource = yaml.safe_load((HOOKS / "kserve.yaml").read_text(encoding="utf-8"))
    image = (HOOKS / "kserve.Dockerfile").read_text(encoding="utf-8")
    (command,) = resource["spec"]["container"]["command"]
    assert command in image and os.access(HOOKS / Path(command).name, os.X_OK)


def action_steps() -> list[dict[str, Any]]:
    return yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["runs"]["steps"]


def test_the_steps_of_the_action_do_what_the_action_says(environment: dict[str, str], tmp_path: Path) -> None:
    install, step = action_steps()
    made = little_artifact(tmp_path / "a; touch hacked")
    assert set(step["env"]) == {"ARTIFACT", "POLICY", "KEY", "SARIF"}
    told = {**environment, "ARTIFACT": made.name, "POLICY": "", "KEY": "", "SARIF": "x.sarif"}
    told |= {"GITHUB_OUTPUT": "out", "GITHUB_STEP_SUMMARY": "summary", "GITHUB_ACTION_PATH": str(ROOT)}
    shell = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c")
    assert run(told, tmp_path, *shell, install["run"]).returncode == 0  # bshub is on the PATH: nothing to install
    assert run(told, tmp_path, *shell, step["run"]).returncode == 0
    (made / "surplus.bin").write_text("x")
    done = run(told, tmp_path, *shell, step["run"])
    assert done.returncode == 1 and "→ move it elsewhere" in done.stdout
    assert run({**told, "POLICY": "none.toml"}, tmp_path, *shell, step["run"]).returncode == 2
    assert (tmp_path / "out").read_text() == "verdict=pass\nverdict=refused\nverdict=error\n"
    summary = (tmp_path / "summary").read_text(encoding="utf-8")
    assert "### bshub gate: refused" in summary and "→ move it elsewhere" in summary and "none.toml is not" in summary
    assert all(line.startswith(("### ", "    ")) for line in summary.splitlines() if line)
    log = json.loads((tmp_path / "x.sarif").read_text(encoding="utf-8"))
    check_sarif(log)
    places = [item["locations"][0]["physicalLocation"] for item in log["runs"][0]["results"]]
    assert "a%3B%20touch%20hacked/surplus.bin" in {place["artifactLocation"]["uri"] for place in places}
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("schema", "file"), [("github-actions", "action.yml"), ("github-workflows", "examples/hooks/workflow.yml")]
)
def test_the_action_and_its_workflow_are_of_the_published_form(
    environment: dict[str, str], schema: str, file: str, tmp_path: Path
) -> None:
    check = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}")
    done = run(environment, tmp_path, *check, ROOT / file)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = (ROOT / file).read_text(encoding="utf-8").replace("runs", "walks").replace("on: [push]", "on: 7")
    (tmp_path / "broken.yml").write_text(broken)
    assert run(environment, tmp_path, *check, "broken.yml").returncode == 1


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="no actionlint")
def test_actionlint_finds_nothing_in_the_action_and_its_workflow(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".github" / "workflows").mkdir(parents=True)
    shutil.copy(HOOKS / "workflow.yml", tmp_path / ".github" / "workflows")
    shutil.copy(ROOT / "action.yml", tmp_path)
    run(environment, tmp_path, "git", "init", "-q")
    done = run(environment, tmp_path, "actionlint", "-no-color")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_finds_nothing_in_the_scripts(environment: dict[str, str], tmp_path: Path) -> None:
    for number, step in enumerate(action_steps()):
        (tmp_path / f"step{number}.sh").write_text(f"#!/bin/bash\n{step['run']}")
    done = run(environment, tmp_path, "shellcheck", *sorted(tmp_path.glob("*.sh")), *sorted(HOOKS.glob("*.sh")))
    assert done.returncode == 0, done.stdout


def commit(environment: dict[str, str], repository: Path) -> str:
    """Commit everything; the commit's id."""
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    run(environment, repository, "git", "init", "-q")
    run(environment, repository, "git", "add", "-A")
    done = run(environment, repository, "git", *who, "commit", "-q", "--no-verify", "-m", "x")
    assert done.returncode == 0, done.stderr
    return run(environment, repository, "git", "rev-parse", "HEAD").stdout.strip()


def test_gate_changed_finds_the_artifacts_of_files(environment: dict[str, str], tmp_path: Path) -> None:
    one = little_artifact(tmp_path / "one model")
    (tmp_path / "notes.md").write_text("x")
    hook = HOOKS / "gate-changed.sh"
    both = [f"{one.name}/README.md", f"{one.name}/config.json"]
    done = run(environment, tmp_path, hook, *both, "notes.md")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("gate, receipt") == 1
    (tmp_path / "lone.onnx").write_bytes(b"x")
    done = run(environment, tmp_path, hook, *both, "lone.onnx")
    assert done.returncode == 1 and "receipt-missing" in done.stdout


def test_gate_changed_sees_a_receipt_that_a_push_deletes(environment: dict[str, str], tmp_path: Path) -> None:
    made = little_artifact(tmp_path / "models" / "ä b")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "old.onnx").write_bytes(b"x")
    first = commit(environment, tmp_path)
    shutil.rmtree(tmp_path / "gone")
    second = commit(environment, tmp_path)
    (made / MANIFEST).unlink()
    third = commit(environment, tmp_path)
    between = ("PRE_COMMIT_FROM_REF", "PRE_COMMIT_TO_REF")
    done = run({**environment, **dict(zip(between, (first, second), strict=True))}, tmp_path, HOOKS / "gate-changed.sh")
    assert (done.returncode, done.stdout) == (0, "")  # a model that is gone is nobody's danger
    done = run({**environment, **dict(zip(between, (second, third), strict=True))}, tmp_path, HOOKS / "gate-changed.sh")
    assert done.returncode == 1 and "receipt-missing" in done.stdout


@pytest.mark.skipif(
    shutil.which("pre-commit", path=f"{BIN}{os.pathsep}{os.environ['PATH']}") is None, reason="no pre-commit"
)
def test_pre_commit_itself_stops_a_push(environment: dict[str, str], tmp_path: Path) -> None:
    hooks, project, remote = tmp_path / "hooks", tmp_path / "project", tmp_path / "remote.git"
    (hooks / "examples" / "hooks").mkdir(parents=True)
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    shutil.copy(HOOKS / "gate-changed.sh", hooks / "examples" / "hooks")
    revision = commit(environment, hooks)
    run(environment, tmp_path, "git", "init", "-q", "--bare", remote)
    made = little_artifact(project / "models" / "cnn")
    used = {"repo": str(hooks), "rev": revision, "hooks": [{"id": "bshub-gate"}]}
    (project / ".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [used]}))

    def push() -> tuple[int, str, str]:
        """Commit, push; code, what was printed, and the commit that the remote has then."""
        commit(environment, project)
        done = run(environment, project, "git", "push", remote, "HEAD:refs/heads/main")
        held = run(environment, remote, "git", "rev-parse", "refs/heads/main")
        return done.returncode, done.stdout + done.stderr, held.stdout.strip()

    run(environment, project, "git", "init", "-q")
    installed = run(environment, project, "pre-commit", "install", "--hook-type", "pre-push")
    assert installed.returncode == 0, installed.stderr
    code, said, held = push()
    assert code == 0 and "Passed" in said, said
    (made / "model.safetensors").write_text("backdoored")
    code, said, still = push()
    assert code != 0 and "Failed" in said, said
    assert "file-changed" in said and "→ restore the file" in said and "the lines above" in said
    assert still == held
    (made / "model.safetensors").write_text("model.safetensors")
    assert push()[0] == 0
    (made / MANIFEST).unlink()
    code, said, _ = push()
    assert code != 0 and "receipt-missing" in said, said


def test_mlflow_promotes_only_what_passes(environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    told = {**environment, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "GIT_PYTHON_REFRESH": "quiet"}
    made, uri = little_artifact(tmp_path / "made"), "sqlite:///registry.db"
    promote = (sys.executable, HOOKS / "mlflow_promote.py", made, "--name", "demo", "--uri", uri)
    done = run(told, tmp_path, *promote)
    assert done.returncode == 0, done.stderr
    assert "version 1 is now demo@champion" in done.stdout
    (made / "model.safetensors").write_text("backdoored")
    done = run(told, tmp_path, *promote)
    assert done.returncode == 1, done.stderr
    assert "file-changed" in done.stderr and "→ restore the file" in done.stderr and "not promoted" in done.stderr
    with sqlite3.connect(tmp_path / "registry.db") as registry:
        aliases = registry.execute("SELECT alias, version FROM registered_model_aliases WHERE name = 'demo'").fetchall()
        tags = registry.execute("SELECT version, value FROM model_version_tags WHERE key = 'bshub.verdict'").fetchall()
    assert aliases == [("champion", 1)]
    assert sorted(tags) == [(1, "pass"), (2, "refused")]
