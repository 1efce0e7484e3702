"""``bshub export``: one file that predicts by itself, on request int8 or with its preprocessing inside; or no file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bare_environment import ONNXRUNTIME, bare_python, bare_variables
from conftest import DEMO, ROOT, Artifact, bshub_command
from nets import randomize_batch_norm
from onnx import parser
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import bshub
from bshub.errors import ExportError
from bshub.intake.images import read_image
from bshub.intake.preprocessing import make_preprocessing
from bshub.release.loaders import onnx_text
from bshub.release.onnx import open_session, opset_of, set_metadata
from bshub.release.onnx_image import compare_pictures, prepend_preprocessing
from bshub.release.onnx_metadata import resized
from bshub.release.quantize import judge, quantize_onnx

ARCH = "timm/test_resnet?num_classes=10&input_size=64"
# The sum of each colour and a few pixels of the middle: wrong resizing, cropping or normalising shows at once.
PROBE = """\
<ir_version: 10, opset_import: ["": {opset}]>
probe (float[batch, 3, {h}, {w}] images) => (float[batch, {n}] logits)
<int64[2] shape = {{0, -1}}> {{ logits = Reshape (images, shape) }}
"""
DATA = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_mode": "center", "interpolation": "bicubic"}
CONFIGS: dict[str, dict[str, Any]] = {
    "square": {"input_size": [3, 16, 16], "crop_pct": 0.875, "interpolation": "bilinear"},
    "bicubic": {"input_size": [3, 17, 17], "crop_pct": 0.9},
    "whole": {"input_size": [3, 16, 16], "crop_pct": 1.0},
    "oblong": {"input_size": [3, 12, 20], "crop_pct": 0.95},
    "squash": {"input_size": [3, 16, 12], "crop_pct": 0.9, "crop_mode": "squash"},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network of timm with weights that answer differently to different images."""
    import timm

    torch.manual_seed(0)
    model = randomize_batch_norm(timm.create_model("test_resnet", num_classes=10))
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pictures() -> list[Tensor]:
    """Photographs in sizes around the small input sizes, odd ones among them."""
    files = sorted((DEMO / "clean").rglob("*.jpg"))[::23]
    sizes = [(32, 32), (40, 27), (19, 33), (64, 65)]
    return [
        torch.from_numpy(np.array(Image.open(file).convert("RGB").resize(size))).permute(2, 0, 1)
        for file, size in zip(files, sizes, strict=False)
    ]


def export(model: object, out: Path, *options: object) -> dict[str, Any]:
    result = bshub_command("export", model, out, *options, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def probe(path: Path, config: dict[str, Any], opset: int = 20) -> Path:
    _, h, w = config["input_size"]
    path.write_bytes(parser.parse_model(PROBE.format(opset=opset, h=h, w=w, n=3 * h * w)).SerializeToString())
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_the_graph_prepares_pictures_as_the_model_does(name: str, tmp_path: Path, pictures: list[Tensor]) -> None:
    config = {**DATA, **CONFIGS[name]}
    prepare = make_preprocessing(config, "a test")
    path = probe(tmp_path / "p.onnx", config)
    prepend_preprocessing(path, config, {"fact": "kept"})
    wanted = torch.stack([prepare(picture) for picture in pictures]).flatten(1).numpy()
    session = open_session(path)
    for picture, row in zip(pictures, wanted, strict=True):
        (ours,) = session.run(None, {"image": picture.permute(1, 2, 0).numpy()[None]})
        steps = np.abs(ours[0] - row) * 255 * 0.225  # grey levels, about
        assert steps.max() < 1.1  # one grey level at most
        assert (steps > 0.1).mean() < 0.3  # another filter, or another place, would move nearly all
    assert session.get_modelmeta().custom_metadata_map == {"fact": "kept"}
    assert compare_pictures(path, pictures, wanted + 1)[0] > 0.1


def test_a_batch_of_pictures_is_prepared_at_once(tmp_path: Path, pictures: list[Tensor]) -> None:
    config = {**DATA, **CONFIGS["square"]}
    path = probe(tmp_path / "p.onnx", config)
    prepend_preprocessing(path, config, {})
    batch = pictures[1].permute(1, 2, 0).numpy()[None].repeat(3, 0)
    (rows,) = open_session(path).run(None, {"image": batch})
    assert rows.shape[0] == 3 and (rows[0] == rows[2]).all()


@pytest.mark.parametrize(
    ("change", "opset", "says"),
    [
        ({"interpolation": "lanczos"}, 20, "'lanczos' resizing"),
        ({"crop_mode": "border"}, 20, "crop mode 'border'"),
        ({}, 17, "needs opset 18"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, change: dict[str, str], opset: int, says: str) -> None:
    config = {**DATA, **CONFIGS["square"], **change}
    path = probe(tmp_path / "p.onnx", config, opset)
    before = path.read_bytes()
    with pytest.raises(ExportError, match=says):
        prepend_preprocessing(path, config, {})
    assert path.read_bytes() == before


def test_the_resize_of_the_metadata_is_timms(pictures: list[Tensor]) -> None:
    from torchvision.transforms import Resize

    for changes in CONFIGS.values():
        config = {**DATA, **changes}
        (step,) = (t for t in make_preprocessing(config, "")._transform.transforms if "Resize" in type(t).__name__)
        box = step.size if isinstance(step.size, (list, tuple)) else (step.size, step.size)
        assert resized(config) == tuple(box), (changes, isinstance(step, Resize))


ALONE = """
import contextlib, importlib.util, io, json, os, sys
for name in ("torch", "torchvision", "timm", "bshub", "onnx", "huggingface_hub", "safetensors"):
    assert importlib.util.find_spec(name) is None, name
program, answers = sys.stdin.read(), []
for image in sys.argv[1:]:
    if os.path.lexists("image.jpg"):
        os.unlink("image.jpg")
    os.symlink(image, "image.jpg")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(program, "card", "exec"), {})
    answers.append(out.getvalue().strip())
print(json.dumps(answers))
"""


def test_the_file_predicts_by_itself_from_its_own_metadata(complete: Artifact, tmp_path: Path) -> None:
    """The card's program answers as bshub does, in an environment with onnxruntime, numpy and Pillow alone."""
    python = bare_python(tmp_path / "bare", ONNXRUNTIME)
    model = bshub.load(str(complete.folder))
    text = (complete.folder / "README.md").read_text(encoding="utf-8")
    program = onnx_text(model.preprocessing.config)
    assert program is not None and f"```python\n{program}\n```" in text and len(program.splitlines()) <= 15
    images = sorted(complete.test_dir.rglob("*.jpg"))[::9]
    # one that must really be resized and cropped
    wide = tmp_path / "wide.png"
    Image.open(images[0]).resize((150, 90)).save(wide)
    (tmp_path / "model.onnx").write_bytes((complete.folder / "model.onnx").read_bytes())
    child = subprocess.run(
        [python, "-c", ALONE, *images, wide],
        cwd=tmp_path, env=bare_variables({"OMP_NUM_THREADS": "1"}), input=program, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert model.labels is not None
    with torch.no_grad():
        logits = [model.module(model.preprocessing(read_image(path))[None]) for path in (*images, wide)]
    assert json.loads(child.stdout) == [model.labels[int(row.argmax())] for row in logits]
    assert len(set(json.loads(child.stdout))) > 3


def test_an_artifact_becomes_a_file_with_everything_inside(
    complete: Artifact, tmp_path: Path, few_test_images: Path
) -> None:
    out = tmp_path / "m.onnx"
    report = export(complete.folder, out, "--clean-dir", DEMO / "clean", "--int8", "--with-preprocessing")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert report["parity"]["holds"] and report["images"]["kind"] == "clean images"
    assert report["int8"]["holds"] and report["int8"]["before"]["n"] == 100
    assert report["preprocessing"]["same_answers"]
    assert out.stat().st_size < (complete.folder / "model.onnx").stat().st_size / 3
    model, session = bshub.load(str(complete.folder)), open_session(out)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == list(model.labels or ())
    assert json.loads(facts["preprocess"])["in_graph"] is True
    assert json.loads(facts["bshub"])["int8"]["agreement"] == report["int8"]["agreement"]
    same = 0
    images = sorted(few_test_images.rglob("*.jpg"))[::4]
    for path in images:
        picture = read_image(path)
        (row,) = session.run(["logits"], {"image": picture.permute(1, 2, 0).numpy()[None]})
        with torch.no_grad():
            same += int(row.argmax() == model.module(model.preprocessing(picture)[None]).argmax())
    assert same >= 0.9 * len(images)
    data = out.read_bytes()
    for place in (str(ROOT), str(tmp_path), str(complete.folder), "site-packages", "stack_trace"):
        assert place.encode() not in data, place


def test_the_opset_is_the_one_that_was_asked_for(weights: Path, tmp_path: Path) -> None:
    report = export(weights, tmp_path / "m.onnx", "--arch", ARCH, "--opset", 18)
    assert opset_of(onnx.load(str(tmp_path / "m.onnx"))) == report["parity"]["opset"] == 18
    assert report["images"]["kind"] == "noise"
    result = bshub_command("export", weights, tmp_path / "other.onnx", "--arch", ARCH, "--opset", 3)
    assert result.exit_code == 1 and "opset 3" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_int8_that_costs_too_much_leaves_no_file(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bshub.export.quantize_onnx", lambda path, images, bits: spoil_classifier(path))
    clean = own_answers(weights, tmp_path / "clean")
    out = tmp_path / "m.onnx"
    result = bshub_command("export", weights, out, "--arch", ARCH, "--clean-dir", clean, "--int8")
    assert result.exit_code == 1, result.output
    assert "int8 costs too much: accuracy 100.0" in result.stderr and "--budget" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["clean"]
    allowed = export(weights, out, "--arch", ARCH, "--clean-dir", clean, "--int8", "--budget", 100)
    assert allowed["int8"]["after"]["percent"] < 100


def test_where_eight_bits_cost_too_much_seven_are_tried(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saturate(path: Path, images: Tensor, bits: int) -> None:
        tried.append((bits, path.stat().st_size))
        quantize_onnx(path, images, bits)
        if bits == 8:  # what a processor without VNNI does to some networks
            spoil_classifier(path)

    tried: list[tuple[int, int]] = []
    monkeypatch.setattr("bshub.export.quantize_onnx", saturate)
    clean = own_answers(weights, tmp_path / "clean")
    report = export(weights, tmp_path / "m.onnx", "--arch", ARCH, "--clean-dir", clean, "--int8", "--budget", 20)
    assert [bits for bits, _ in tried] == [8, 7] and tried[0][1] == tried[1][1], "each begins with the float file"
    assert report["int8"]["bits"] == 7 and report["int8"]["holds"]


def spoil_classifier(path: Path) -> None:
    """Everything becomes one class."""
    proto = onnx.load(str(path))
    for tensor in proto.graph.initializer:
        if len(tensor.dims) == 2:
            zeros = np.zeros_like(onnx.numpy_helper.to_array(tensor))
            tensor.CopyFrom(onnx.numpy_helper.from_array(zeros, tensor.name))
    path.write_bytes(proto.SerializeToString())


def own_answers(weights: Path, folder: Path) -> Path:
    """Photographs in folders named after the network's own answers."""
    model = bshub.load(str(weights), arch=ARCH)
    for number, file in enumerate(sorted((DEMO / "clean").rglob("*.jpg"))[::3]):
        with torch.no_grad():
            answer = int(model.module(model.preprocessing(read_image(file))[None]).argmax())
        (folder / str(answer)).mkdir(parents=True, exist_ok=True)
        (folder / str(answer) / f"{number}.jpg").write_bytes(file.read_bytes())
    assert len(list(folder.iterdir())) > 1
    return folder


class Answers:
    """A session whose answer is a table's."""

    def __init__(self, answers: list[int]) -> None:
        self._answers = iter(answers)

    def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
        rows = np.zeros((len(feed["images"]), 3), np.float32)
        for row in rows:
            row[next(self._answers)] = 1
        return [rows]


@pytest.mark.parametrize(("budget", "holds"), [(0.0, False), (24.9, False), (25.0, True), (100.0, True)])
def test_the_gate_counts_what_int8_loses(budget: float, holds: bool) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    before, after = [0, 1, 2, 0, 1, 2, 1, 1], [0, 1, 2, 0, 1, 0, 1, 0]
    batches = [(torch.zeros(5, 1, 1, 1), labels[:5]), (torch.zeros(3, 1, 1, 1), labels[5:])]
    result = judge(Answers(before), Answers(after), batches, budget, 8)
    assert (result.before.hits, result.after.hits, result.agreement.hits, result.before.n) == (7, 5, 6, 8)
    assert result.holds is holds


REFUSALS = {
    "no clean images": (2, "--clean-dir", ["{out}", "--int8"]),
    "no suffix": (2, ".onnx", ["{folder}/model"]),
    "no folder": (2, "cannot be written", ["{folder}/nowhere/m.onnx"]),
    "nan budget": (2, "budget", ["{out}", "--budget", "nan"]),
}


@pytest.mark.parametrize(("code", "said", "arguments"), REFUSALS.values(), ids=REFUSALS)
def test_export_says_no_in_one_line(weights: Path, tmp_path: Path, code: int, said: str, arguments: list[str]) -> None:
    places = [a.format(out=tmp_path / "m.onnx", folder=tmp_path) for a in arguments]
    result = bshub_command("export", weights, *places, "--arch", ARCH)
    assert result.exit_code == code and said in result.stderr and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_replaced_unasked(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("mine")
    result = bshub_command("export", weights, tmp_path / "m.onnx", "--arch", ARCH)
    assert result.exit_code == 2 and "--overwrite" in result.stderr
    assert (tmp_path / "m.onnx").read_text() == "mine"


def test_metadata_is_replaced_not_added_to() -> None:
    proto = parser.parse_model(PROBE.format(opset=20, h=2, w=2, n=12))
    set_metadata(proto, {"a": "1", "b": [1]})
    set_metadata(proto, {"a": "2"})
    assert [(entry.key, entry.value) for entry in proto.metadata_props] == [("a", "2")]
