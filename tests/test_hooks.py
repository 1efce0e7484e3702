"""The hooks of examples/hooks, each run as it is shipped: what passes goes through, what does not is stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

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


def test_the_storage_initializer_stops_the_pod_and_empties_the_volume(
    environment: dict[str, str], tmp_path: Path
) -> None:
    made, volume = little_artifact(tmp_path / "made"), tmp_path / "volume"
    fetch = tmp_path / "fetch.sh"
    fetch.write_text('#!/bin/sh\nmkdir -p "$2" && cp -R "$1"/. "$2"\n')
    fetch.chmod(0o755)
    told = {**environment, "BSHUB_DOWNLOAD": str(fetch)}
    assert run(told, tmp_path, HOOKS / "kserve-initializer.sh", made, volume).returncode == 0
    assert (volume / "model.safetensors").is_file()
    (made / "README.md").unlink()
    shutil.rmtree(volume)
    done = run(told, tmp_path, HOOKS / "kserve-initializer.sh", made, volume)
    assert done.returncode == 1
    assert "file-missing" in done.stdout and "refused" in done.stderr
    assert list(volume.iterdir()) == []
    assert run(told, tmp_path, HOOKS / "kserve-initializer.sh", tmp_path / "none", volume).returncode != 0


def test_the_steps_of_the_action_do_what_the_action_says(environment: dict[str, str], tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    step = next(step for step in action["runs"]["steps"] if step.get("id") == "gate")
    made = little_artifact(tmp_path / "a; touch hacked")
    assert set(step["env"]) == {"ARTIFACT", "POLICY", "KEY", "SARIF"}
    told = {**environment, "ARTIFACT": str(made), "POLICY": "", "KEY": "", "SARIF": "x.sarif", "GITHUB_OUTPUT": "out"}
    shell = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"])
    assert run(told, tmp_path, *shell).returncode == 0
    (made / "surplus.bin").write_text("x")
    assert run(told, tmp_path, *shell).returncode == 1
    assert (tmp_path / "out").read_text() == "verdict=pass\nverdict=refused\n"
    assert "file-surplus" in (tmp_path / "x.sarif").read_text()
    assert not (tmp_path / "hacked").exists()


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


@pytest.mark.skipif(
    shutil.which("pre-commit", path=f"{BIN}{os.pathsep}{os.environ['PATH']}") is None, reason="no pre-commit"
)
def test_pre_commit_itself_stops_a_push(environment: dict[str, str], tmp_path: Path) -> None:
    hooks, project = tmp_path / "hooks", tmp_path / "project"
    (hooks / "examples" / "hooks").mkdir(parents=True)
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    shutil.copy(HOOKS / "gate-changed.sh", hooks / "examples" / "hooks")
    revision = commit(environment, hooks)
    made = little_artifact(project / "models" / "cnn")
    used = {"repo": str(hooks), "rev": revision, "hooks": [{"id": "bshub-gate"}]}
    (project / ".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [used]}))
    commit(environment, project)
    push = ("pre-commit", "run", "--hook-stage", "pre-push", "--all-files")
    done = run(environment, project, *push)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed" in done.stdout
    (made / "model.safetensors").write_text("backdoored")
    commit(environment, project)
    done = run(environment, project, *push)
    assert done.returncode == 1
    assert "file-changed" in done.stdout and "Failed" in done.stdout
