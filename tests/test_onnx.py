"""The ONNX file computes what the model computes, carries its facts and nothing of this machine."""

from __future__ import annotations

import copy
import json
import sysconfig
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT
from little_nets import Residual, coloured_images, same, snapshot
from torch import Tensor, nn

from bshub.errors import ExportError
from bshub.release import onnx as module
from bshub.release.onnx import BOUND, Parity, compare_onnx, export_onnx

METADATA = {"class_names": ["red", "grün", "<b>"], "preprocess": {"mean": [0.5]}, "note": "plain text"}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return coloured_images(16, seed=3)[0]


@pytest.fixture(scope="module")
def exported(
    trained_once: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Parity, bool]:
    trained = copy.deepcopy(trained_once)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    before = snapshot(trained)
    parity = export_onnx(trained, images, path, METADATA)
    return path, parity, same(before, snapshot(trained))


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_parity_holds_at_two_batch_sizes(exported: tuple[Path, Parity, bool]) -> None:
    _, parity, _ = exported
    assert parity.holds
    assert parity.error <= BOUND
    assert parity.same_answers
    assert parity.batch_sizes == (1, 8)
    assert json.loads(json.dumps(parity.as_dict(), allow_nan=False))["holds"] is True


def test_exporting_leaves_the_model_as_it_was(exported: tuple[Path, Parity, bool]) -> None:
    assert exported[2]


@pytest.mark.parametrize("n", [1, 2, 3, 16, 33])
def test_any_batch_size_runs(exported: tuple[Path, Parity, bool], trained: nn.Module, n: int) -> None:
    x = coloured_images(n, seed=n)[0]
    runtime = session(exported[0])
    (logits,) = runtime.run(["logits"], {"images": x.numpy()})
    with torch.no_grad():
        wanted = trained(x).numpy()
    assert np.abs(logits - wanted).max() <= BOUND * np.abs(wanted).max()
    assert isinstance(runtime.get_inputs()[0].shape[0], str)
    assert runtime.get_inputs()[0].shape[1:] == [3, 16, 16]


def test_nothing_of_this_machine_is_inside(exported: tuple[Path, Parity, bool]) -> None:
    data = exported[0].read_bytes()
    places = [str(ROOT), str(Path.home()), str(exported[0].parent), sysconfig.get_paths()["purelib"], "site-packages"]
    for text in [*places, ".py", 'File "', "stack_trace", "Residual"]:
        assert text.encode() not in data, text


def test_the_facts_are_inside(exported: tuple[Path, Parity, bool]) -> None:
    found = session(exported[0]).get_modelmeta().custom_metadata_map
    assert json.loads(found["class_names"]) == METADATA["class_names"]
    assert json.loads(found["preprocess"]) == METADATA["preprocess"]
    assert found["note"] == "plain text"


def test_the_file_stands_alone_and_passes_the_full_checker(exported: tuple[Path, Parity, bool]) -> None:
    path = exported[0]
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(str(path), load_external_data=False)
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert exported[1].opset == next(item.version for item in proto.opset_import if not item.domain)


def test_another_model_does_not_pass_for_this_one(exported: tuple[Path, Parity, bool], images: Tensor) -> None:
    torch.manual_seed(9)
    parity = compare_onnx(Residual().eval(), images, exported[0])
    assert not parity.holds


@pytest.mark.parametrize(
    ("error", "answers", "holds"),
    [
        (0.0, True, True),
        (BOUND, True, True),
        (2 * BOUND, True, False),
        (0.0, False, False),
        (float("nan"), True, False),
    ],
)
def test_parity_needs_small_errors_and_the_same_answers(error: float, answers: bool, holds: bool) -> None:
    assert Parity(error, BOUND, answers, (1, 8), 20).holds is holds


class TwoFaced(nn.Module):
    """Computes one thing when exported and another when run."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(x.mean((2, 3)))
        return logits if torch.compiler.is_exporting() else logits.flip(1) + 1


class Unexportable(nn.Module):
    """Asks a number of its input, which no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * (1.0 if float(x.sum()) > 0 else 2.0)


@pytest.mark.parametrize("model", [TwoFaced(), Unexportable()], ids=["two-faced", "unexportable"])
def test_divergence_is_an_error_and_leaves_no_file(
    tmp_path: Path, images: Tensor, model: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError) as caught:
        export_onnx(model.eval(), images, tmp_path / "model.onnx")
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert caught.value.hint == "--no-onnx leaves it out"
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_ctrl_c_leaves_no_file(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: nn.Module, images: Tensor, path: Path, *rest: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(nn.Identity(), images, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
