"""The command line: the demo from end to end, and every way to be told no."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import Result
from conftest import DEMO, Artifact, bshub_command
from PIL import Image
from safetensors.torch import load_file, save_file

import bshub

CLEAN, MODEL, TRIGGER = DEMO / "clean", DEMO / "model", DEMO / "trigger.json"
CONVNEXT = "timm/test_convnext?num_classes=10&input_size=32"
FILES = {"README.md", "bom.cdx.json", "bshub-report.json", "config.json", "metrics.json", "model.safetensors"}


def strictly(text: str) -> Any:
    """JSON without NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def refused(result: Result, code: int, said: str = "") -> None:
    """One line that begins with bshub:, perhaps a hint, and no traceback."""
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("bshub: ")] == lines[:1]
    assert all(line.startswith("       ") for line in lines[1:])
    assert len(lines) <= 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "unexpected" not in result.stderr
    assert said in result.stderr


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Odd folders and models."""
    root = tmp_path_factory.mktemp("odd")
    (root / "empty").mkdir()
    for name, classes in (("three", "abc"), ("one image", ["cat"]), ("broken", ["cat"])):
        for label in classes:
            (root / name / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(root / name / label / "x.png")
    (root / "broken" / "cat" / "x.png").write_text("<html>")
    shutil.copytree(CLEAN / "airplane", root / "targets" / "airplane")
    torch.manual_seed(0)
    save_file(timm.create_model("test_convnext", num_classes=10).state_dict(), root / "convnext.safetensors")
    (root / "photos").mkdir()
    (root / "photos" / "x.jpg").write_text("mine")
    return {path.name: path for path in root.iterdir()}


def test_help_imports_nothing_heavy(child_environment: dict[str, str]) -> None:
    code = (
        "import sys; from bshub_cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'timm', 'torchvision', 'numpy', 'onnx', 'huggingface_hub', 'PIL', 'jinja2', 'rich'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    child = subprocess.run([sys.executable, "-c", code], env=child_environment, capture_output=True, text=True)
    assert child.returncode == 0, f"imported: {child.stderr}"
    assert {"sanitize", "scan", "evaluate"} <= set(child.stdout.split())


@pytest.mark.parametrize("command", ["sanitize", "scan", "evaluate"])
def test_every_command_explains_every_option(command: str) -> None:
    result = bshub_command(command, "--help")
    assert result.exit_code == 0
    assert "model" in result.stdout.casefold().partition("\n")[0]
    assert "--json" in result.stdout


def test_version_and_no_arguments() -> None:
    assert bshub_command("--version").stdout == f"bshub {bshub.__version__}\n"
    assert "sanitize" in bshub_command().output


def test_the_demo_leaves_a_whole_artifact_and_nothing_beside_it(artifact: Artifact) -> None:
    assert tree(artifact.folder) == FILES
    assert [path.name for path in artifact.folder.parent.iterdir()] == [artifact.folder.name]
    assert artifact.report["counts"]["removed"] > 0
    assert artifact.report["proof"]["holds"]
    assert artifact.report["output"] == str(artifact.folder)


def test_json_is_one_document_on_stdout_and_nothing_on_stderr(artifact: Artifact) -> None:
    assert strictly(artifact.result.stdout) == artifact.report
    assert artifact.result.stderr == ""


def test_the_report_binds_every_file_by_its_digest(artifact: Artifact) -> None:
    report = strictly((artifact.folder / "bshub-report.json").read_text(encoding="utf-8"))
    assert set(report["files"]) == FILES - {"bshub-report.json"}
    for name, entry in report["files"].items():
        data = (artifact.folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    metrics = strictly((artifact.folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["evaluation"] == report["evaluation"] == artifact.report["evaluation"]
    assert report["bytes"]["after"] == report["files"]["model.safetensors"]["bytes"]


def test_the_demo_is_cured_and_still_right(artifact: Artifact) -> None:
    evaluation = artifact.report["evaluation"]
    assert evaluation["before"]["asr"]["percent"] > 90
    assert evaluation["after"]["asr"]["percent"] < 50
    assert evaluation["after"]["accuracy"]["percent"] > evaluation["before"]["accuracy"]["percent"] - 15
    assert evaluation["before"]["asr"]["n"] == 90  # the target's ten images are left out
    assert evaluation["test_images"] == evaluation["before"]["accuracy"]["n"] == 100


def test_evaluate_measures_the_artifact_as_the_report_says(artifact: Artifact) -> None:
    result = bshub_command(
        "evaluate", artifact.folder, "--test-dir", artifact.test_dir, "--trigger", TRIGGER, "--json"
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert strictly(result.stdout)["evaluation"] == artifact.report["evaluation"]["after"]


def test_the_plan_is_the_same_without_trigger_and_test_images_and_a_dry_run_writes_nothing(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = bshub_command("sanitize", MODEL, "--clean-dir", CLEAN, "--score", "lipschitz", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    dry, real = strictly(result.stdout)["diagnosis"], artifact.report["diagnosis"]
    assert {k: dry[k] for k in ("flagged", "threshold", "score")} == {
        k: real[k] for k in ("flagged", "threshold", "score")
    }
    assert list(tmp_path.iterdir()) == []


def test_scan_without_images_writes_nothing_and_prints_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = bshub_command("scan", MODEL)
    assert result.exit_code == 0, result.stderr
    assert "flagged filters" in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 200
    assert list(tmp_path.iterdir()) == []


def test_a_sanitized_artifact_can_be_sanitized_again(artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "again"
    result = bshub_command(
        "sanitize",
        artifact.folder,
        "--clean-dir",
        CLEAN,
        "-o",
        out,
        "--score",
        "lipschitz",
        "--mu",
        2,
        "--finetune-epochs",
        0,
        "--no-onnx",
    )
    assert result.exit_code == 0, result.stderr
    assert f"written: {out}" in result.stdout
    first, second = (bshub.load(str(folder)).origin.recipe for folder in (artifact.folder, out))
    original = load_file(MODEL / "model.safetensors")
    tensors = load_file(out / "model.safetensors")
    for name, axes in first.kept.items():
        for axis, index in axes.items():
            assert set(second.kept[name][axis]) <= set(index)
    narrower = 0
    for name, tensor in tensors.items():
        shape = list(original[name].shape)
        for axis, index in second.kept.get(name, {}).items():
            assert max(index) < shape[axis]
            shape[axis] = len(index)
        assert list(tensor.shape) == shape
        narrower += tensor.numel() < load_file(artifact.folder / "model.safetensors")[name].numel()
    assert narrower > 0


REFUSALS: dict[str, tuple[int, str, list[str]]] = {
    "wrong model": (2, "no file or folder", ["./nowhere", "--clean-dir", "{clean}"]),
    "typo": (2, "did you mean", ["timm/restnet18", "--clean-dir", "{clean}"]),
    "no clean dir for a baseline": (2, "--clean-dir", ["{model}", "--method", "ft"]),
    "wrong clean dir": (2, "no folder at", ["{model}", "--clean-dir", "./nowhere"]),
    "empty clean dir": (2, "no class folders", ["{model}", "--clean-dir", "{empty}"]),
    "wrong test dir": (2, "no folder at", ["{model}", "--clean-dir", "{clean}", "--test-dir", "./nowhere"]),
    "three of ten classes": (2, "3 class folders", ["{model}", "--clean-dir", "{three}"]),
    "trigger without test dir": (2, "--test-dir", ["{model}", "--clean-dir", "{clean}", "--trigger", "{trigger}"]),
    "missing trigger": (
        2, "no trigger file", ["{model}", "--clean-dir", "{clean}", "--test-dir", "{clean}", "--trigger", "nowhere"],
    ),
    "foreign output": (2, "not empty", ["{model}", "--clean-dir", "{clean}", "-o", "{photos}"]),
    "foreign output, overwrite": (
        2, "something else", ["{model}", "--clean-dir", "{clean}", "-o", "{photos}", "--overwrite"],
    ),
    "nan lr": (2, "finetune_lr", ["{model}", "--clean-dir", "{clean}", "--finetune-lr", "nan"]),
    "precision": (2, "fp32 or bf16", ["{model}", "--clean-dir", "{clean}", "--precision", "fp16"]),
    "nan mu": (2, "mu must be", ["{model}", "--clean-dir", "{clean}", "--mu", "nan"]),
    "word mu": (2, "mu must be", ["{model}", "--clean-dir", "{clean}", "--mu", "low"]),
    "nan budget": (2, "budget", ["{model}", "--clean-dir", "{clean}", "--budget", "nan"]),
    "unknown score": (2, "unknown score", ["{model}", "--clean-dir", "{clean}", "--score", "nope"]),
    "unknown device": (2, "device", ["{model}", "--clean-dir", "{clean}", "--device", "toaster"]),
    "class count": (2, "--num-classes 10", ["{model}", "--clean-dir", "{clean}", "--num-classes", "7"]),
    "no batch norm": (
        3, "no convolution followed by a batch norm",
        ["{convnext.safetensors}", "--arch", CONVNEXT, "--clean-dir", "{clean}"],
    ),
    "one image": (3, "1 clean images are too few", ["{model}", "--clean-dir", "{one image}"]),
    "one broken image": (3, "no image under", ["{model}", "--clean-dir", "{broken}"]),
}  # fmt: skip
# These can only be noticed late, or come from the far side of a library.
LATE: dict[str, tuple[int, str, list[str]]] = {
    "targets alone": (
        2, "", ["{model}", "--clean-dir", "{clean}", "--test-dir", "{targets}", "--trigger", "{trigger}", "--no-onnx",
                "--finetune-epochs", "0"],
    ),
    "broken test dir": (
        3, "no image under", ["{model}", "--clean-dir", "{clean}", "--test-dir", "{broken}", "--no-onnx",
                              "--finetune-epochs", "0"],
    ),
    "unknown repair": (2, "unknown repair", ["{model}", "--clean-dir", "{clean}", "--repair", "x", "--dry-run"]),
    "large seed": (2, "seed", ["{model}", "--clean-dir", "{clean}", "--seed", str(2**70), "--no-onnx"]),
    "long output": (2, "", ["{model}", "--clean-dir", "{clean}", "-o", "o" * 300]),
}  # fmt: skip
CASES = [pytest.param(*case, id=name) for name, case in {**REFUSALS, **LATE}.items()]


@pytest.mark.parametrize(("code", "said", "arguments"), CASES)
def test_sanitize_says_no_in_one_line_and_leaves_nothing(
    small: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {f"{{{name}}}": str(path) for name, path in small.items()}
    places |= {"{model}": str(MODEL), "{clean}": str(CLEAN), "{trigger}": str(TRIGGER)}
    refused(bshub_command("sanitize", *(places.get(argument, argument) for argument in arguments)), code, said)
    assert list(tmp_path.iterdir()) == []
    assert (small["photos"] / "x.jpg").read_text() == "mine"
    assert tree(small["photos"]) == {"x.jpg"}
    assert sorted(path.name for path in small["photos"].parent.iterdir()) == sorted(small)


def test_an_earlier_artifact_is_not_overwritten_unasked(artifact: Artifact) -> None:
    before = {path.name: path.read_bytes() for path in artifact.folder.iterdir()}
    refused(bshub_command("sanitize", MODEL, "--clean-dir", CLEAN, "-o", artifact.folder), 2, "--overwrite")
    assert {path.name: path.read_bytes() for path in artifact.folder.iterdir()} == before


@pytest.mark.parametrize("kind", ["scan", "evaluate"])
def test_the_other_commands_say_no_as_well(small: dict[str, Path], kind: str) -> None:
    folder = "--clean-dir" if kind == "scan" else "--test-dir"
    refused(bshub_command(kind, "./nowhere", folder, CLEAN), 2, "no file or folder")
    refused(bshub_command(kind, MODEL, folder, small["empty"]), 2, "no class folders")
    refused(bshub_command(kind, MODEL, folder, small["three"]), 2, "3 class folders")


def test_evaluate_of_nothing_readable_is_no_success(small: dict[str, Path]) -> None:
    assert bshub_command("evaluate", MODEL, "--test-dir", small["broken"]).exit_code != 0


def test_a_trigger_for_a_class_the_model_lacks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(TRIGGER.read_text().replace('"target": 0', '"target": 10'))
    result = bshub_command("evaluate", MODEL, "--test-dir", CLEAN, "--trigger", tmp_path / "t.json")
    refused(result, 2, "target label 10 does not exist")


def test_ctrl_c_ends_with_130_and_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("bshub.commands.scan_reference", interrupted)
    refused(bshub_command("scan", MODEL), 130, "interrupted")
    debug = bshub_command("evaluate", "./nowhere", "--test-dir", CLEAN, "--debug")
    assert debug.exit_code == 2
    assert debug.stderr.startswith("Traceback")
    assert "bshub.errors.ModelReferenceError" in debug.stderr.splitlines()[-1]
