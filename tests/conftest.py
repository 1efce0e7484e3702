"""Fixtures that are expensive enough to be made once."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from little_nets import Residual, train
from torch import nn
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"
# a quick run that prunes something: no search for a trigger, no repair, no ONNX
BY_WEIGHTS = (
    "--clean-dir", DEMO / "clean", "--score", "lipschitz", "--mu", 2.5, "--finetune-epochs", 0, "--no-onnx",
)  # fmt: skip


@dataclass(frozen=True)
class Artifact:
    """The demo's sanitized model: where it lies and what the command printed."""

    folder: Path
    result: Result
    report: dict[str, Any]
    test_dir: Path


def bshub_command(*arguments: object) -> Result:
    """Run the command line in this process."""
    from bshub_cli.main import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def trained_once() -> nn.Module:
    """What ``trained`` gives copies of."""
    torch.manual_seed(0)
    return train(Residual())


@pytest.fixture
def trained(trained_once: nn.Module) -> nn.Module:
    """A small residual net that tells the coloured images apart; each test has its own."""
    return copy.deepcopy(trained_once)


@pytest.fixture(scope="session")
def few_test_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten held-out images of each class of the demo."""
    folder = tmp_path_factory.mktemp("held") / "test"
    for source in sorted((DEMO / "heldout").iterdir()):
        (folder / source.name).mkdir(parents=True)
        for image in sorted(source.iterdir())[:10]:
            shutil.copy(image, folder / source.name)
    return folder


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory, few_test_images: Path) -> Artifact:
    """The demo, judged by its weights, one epoch, without ONNX and report page, with the trigger to measure."""
    folder = tmp_path_factory.mktemp("artifact") / "out"
    result = bshub_command(
        "sanitize", DEMO / "model", "--clean-dir", DEMO / "clean", "--test-dir", few_test_images,
        "--trigger", DEMO / "trigger.json", "--score", "lipschitz", "--finetune-epochs", 1,
        "--no-onnx", "--no-report", "--json", "-o", folder,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return Artifact(folder, result, json.loads(result.stdout), few_test_images)


@pytest.fixture(scope="session")
def complete(tmp_path_factory: pytest.TempPathFactory, few_test_images: Path) -> Artifact:
    """The demo with everything an artifact can hold: ONNX, dense copy, report page with clean images."""
    folder = tmp_path_factory.mktemp("complete") / "out"
    result = bshub_command(
        "sanitize", DEMO / "model", "--clean-dir", DEMO / "clean", "--test-dir", few_test_images,
        "--trigger", DEMO / "trigger.json",
        "--score", "lipschitz", "--mu", 2.25, "--finetune-epochs", 1, "--dense", "--json", "-o", folder,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return Artifact(folder, result, json.loads(result.stdout), few_test_images)


@pytest.fixture
def child_environment() -> dict[str, str]:
    """The environment of a child process: one thread, the tests' own folder left out of the path."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
