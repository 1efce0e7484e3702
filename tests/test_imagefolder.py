"""Images with a table, images without labels, and data sets of the Hub: the layouts beside class folders."""

from __future__ import annotations

import html
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bad.bench import contents, make_images, make_model
from conftest import bshub_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback_hub import LoopbackHub, point_client_at
from PIL import Image
from torch import nn

import bshub
from bshub.errors import BshubError, ImageDataError, InconclusiveError
from bshub.intake import hub as intake
from bshub.intake.answers import label_by_answers
from bshub.intake.datasets import MAX_FILES, fetch_dataset, parse_dataset
from bshub.intake.folders import ClassFolder, open_folder, open_unlabelled

NAMES = ("bird", "cat", "dog")
ROWS = [("a.png", "dog"), ("deep/b.png", "bird"), ("deep/c.png", "dog")]


def images(root: Path, *names: str) -> Path:
    for place, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * place, 9, 9)).save(root / name, "PNG")
    return root


def tabled(root: Path, rows: list[tuple[Any, Any]], kind: str = "csv", column: str = "label") -> Path:
    images(root, *(name for name, _ in ROWS))
    lines = [json.dumps({"file_name": name, column: label, "caption": "x"}) for name, label in rows]
    if kind == "csv":
        lines = [f"file_name,{column},caption"] + [f"{name},{label},x" for name, label in rows]
    (root / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    return root


def listing(folder: ClassFolder) -> dict[str, int]:
    return {
        path.relative_to(folder.root).as_posix(): label for path, label in zip(folder.paths, folder.labels, strict=True)
    }


def refused(root: Path, classes: int = 3, labels: tuple[str, ...] | None = NAMES) -> str:
    with pytest.raises(ImageDataError) as caught:
        open_folder(root, classes, labels)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- tables


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("column", ["label", "labels", "class", "category"])
def test_a_table_gives_the_labels(tmp_path: Path, kind: str, column: str) -> None:
    folder = open_folder(tabled(tmp_path, ROWS, kind, column), 3, NAMES)
    assert listing(folder) == {"a.png": 2, "deep/b.png": 0, "deep/c.png": 2}
    assert folder.matched == f"labels in column {column} of metadata.{kind} matched to the model's labels"
    assert len(list(folder.read())) == 3


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_numbers_in_a_table_are_indices(tmp_path: Path, kind: str) -> None:
    folder = open_folder(tabled(tmp_path, [("a.png", 2), ("deep/b.png", 0)], kind), 3, NAMES)
    assert listing(folder) == {"a.png": 2, "deep/b.png": 0}
    assert "read as label indices" in folder.matched
    assert "are not indices of 2 classes" in refused(tmp_path, 2, None)


def test_a_table_without_labels_leaves_it_to_the_folders(tmp_path: Path) -> None:
    images(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption\ncat/a.png,hello\n")
    assert listing(open_folder(tmp_path, 3, NAMES)) == {"cat/a.png": 1, "dog/b.png": 2}


def test_a_missing_image_of_a_table_is_an_unreadable_one(tmp_path: Path) -> None:
    folder = open_folder(tabled(tmp_path, [*ROWS, ("gone.png", "cat")]), 3, NAMES)
    assert len(list(folder.read())) == 3
    assert [path.name for path in folder.rejected] == ["gone.png"]


def test_windows_separators_are_separators(tmp_path: Path) -> None:
    assert listing(open_folder(tabled(tmp_path, [("deep\\b.png", "cat")]), 3, NAMES)) == {"deep/b.png": 1}


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "deep/../../a.png", "C:/a.png", "\\\\host\\a.png", "..\\a.png", ".."]
)
def test_a_table_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    images(tmp_path, "a.png")
    assert "leads out of the folder" in refused(tabled(tmp_path / "in", [(name, "cat")], "jsonl"))


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_a_linked_folder_of_a_table_leads_nowhere_else(tmp_path: Path) -> None:
    images(tmp_path / "secret", "s.png")
    root = tabled(tmp_path / "in", [*ROWS, ("away/s.png", "cat")])
    (root / "away").symlink_to(tmp_path / "secret")
    assert "leads out of" in refused(root)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name,label\na.png,cat\na.png,dog\n", "has two labels"),
        ("file_name,label\n", "has no rows"),
        ("label\ncat\n", "file_name among them"),
        ("file_name,label,label\na.png,cat,dog\n", "each column once"),
        ("file_name,label\na.png\n", "another number of fields"),
        ("file_name,label\na.png,cat,dog\n", "another number of fields"),
        ("file_name,label\na.png,\n", "label is ''"),
        ("file_name,label\n,cat\n", "file_name is ''"),
        ('file_name,label\n"a.png,cat\n', "cannot be read"),
        ("file_name,label\n" + "x" * 200_000 + ",cat\n", "cannot be read"),
        (b"file_name,label\n\xff,cat\n", "cannot be read"),
        (b"file_name,label\na\x00.png,cat\n", ""),
    ],
)
def test_a_bad_csv_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert said in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]\n", "line 1 is not an object"),
        ("{\n", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"file_name": 3, "label": "cat"}', "file_name is 3"),
        ('{"label": "cat"}', "file_name is None"),
        ('{"file_name": "a.png", "label": 1.0}', "label is 1.0"),
        ('{"file_name": "a.png", "label": true}', "label is True"),
        ('{"file_name": "a.png", "label": null}', "label is None"),
        ('{"file_name": "a.png", "label": ["cat"]}', "label is ['cat']"),
        ('{"file_name": "a\\u0000.png", "label": "cat"}', "file_name is"),
        ('{"file_name": "a.png", "label": "c\\u001b[2Jat"}', "\\x1b"),
    ],
)
def test_bad_json_lines_are_refused(tmp_path: Path, text: str, said: str) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    assert said in refused(tmp_path)


def test_two_tables_a_parquet_table_and_a_huge_one_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bshub.intake.metadata._MAX_BYTES", 1 << 20)
    for kind in ("csv", "jsonl"):
        tabled(tmp_path / "two", ROWS, kind)
    assert "holds both" in refused(tmp_path / "two")
    images(tmp_path / "parquet", "a.png")
    (tmp_path / "parquet" / "metadata.parquet").touch()
    assert "Parquet table" in refused(tmp_path / "parquet")
    images(tmp_path / "huge", "a.png")
    with (tmp_path / "huge" / "metadata.csv").open("wb") as stream:
        stream.truncate((1 << 20) + 1)
    assert "larger than 1 MiB" in refused(tmp_path / "huge")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["csv", "jsonl"]),
    st.binary(max_size=60)
    | st.text(max_size=40).map(lambda text: b"file_name,label\n" + text.encode())
    | st.dictionaries(st.sampled_from(["file_name", "label"]), st.none() | st.integers() | st.text(max_size=5))
    .map(json.dumps)
    .map(str.encode),
)
def test_any_bytes_are_a_table_or_one_kind_of_error(tmp_path: Path, kind: str, data: bytes) -> None:
    root = images(tmp_path / kind, "cat/a.png")
    (root / f"metadata.{kind}").write_bytes(data)
    try:
        folder = open_folder(root, 3, NAMES)
    except BshubError:
        return
    assert all(path.is_relative_to(root) for path in folder.paths)
    assert set(folder.labels) <= {0, 1, 2}


# --- splits and other layouts


def test_splits_are_told_with_the_way_out(tmp_path: Path) -> None:
    images(tmp_path, "train/cat/a.png", "test/cat/a.png")
    assert "holds splits (test, train), not classes" in refused(tmp_path)
    assert len(open_folder(tmp_path / "train", 3, NAMES)) == 1
    assert listing(open_folder(tmp_path, 2, ("train", "test"))) == {"train/cat/a.png": 0, "test/cat/a.png": 1}


def test_parquet_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00001.parquet").touch()
    assert "holds Parquet files and no class folders" in refused(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    images(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "dog").chmod(0)
    try:
        assert "cannot be read" in refused(tmp_path)
    finally:
        (tmp_path / "dog").chmod(0o700)


# --- without labels


@pytest.fixture(scope="module")
def sure_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bench's model with a head that tells dark images from bright ones and is sure of it, bar those between."""
    return make_model(tmp_path_factory.mktemp("model") / "m")


class ByBrightness(nn.Module):
    """Sure of class 2 where the image is bright, of class 0 where it is dark, unsure in the middle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        light = x.mean((1, 2, 3))
        return torch.stack([-20 * light, torch.zeros_like(light), 20 * light], 1)


def shades(root: Path, values: dict[str, int]) -> Path:
    for name, value in values.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (value,) * 3).save(root / name)
    return root


def test_images_without_labels_get_the_models_confident_answers(tmp_path: Path, sure_model: Path) -> None:
    source = bshub.load(str(sure_model))
    object.__setattr__(source, "module", ByBrightness())
    values = {"a.png": 250, "b.png": 128, "x/c.png": 3, "x/y/d.png": 240, "z/e.png": 5}
    folder = open_unlabelled(shades(tmp_path, values))
    (tmp_path / "z" / "broken.png").write_bytes(b"x")
    folder = open_unlabelled(tmp_path)
    assert (len(folder), set(folder.labels)) == (6, {0})
    seen: list[int] = []
    labelled = label_by_answers(folder, source, torch.device("cpu"), 2, progress=seen.append)
    assert listing(labelled) == {"a.png": 2, "x/c.png": 0, "x/y/d.png": 2, "z/e.png": 0}
    assert labelled.matched == "the model's own answers, where it is at least 90 % sure: 4 of 5 images"
    assert [path.name for path in labelled.rejected] == ["broken.png"]
    assert sum(seen) == 5
    assert [label for _, label in labelled.read()] == [2, 0, 2, 0]
    with pytest.raises(InconclusiveError, match="not 90 % sure of any image"):
        label_by_answers(open_unlabelled(shades(tmp_path / "grey", {"g.png": 128})), source, torch.device("cpu"), 2)


def test_an_unlabelled_folder_needs_images(tmp_path: Path) -> None:
    with pytest.raises(ImageDataError, match="holds no images"):
        open_unlabelled(tmp_path)
    with pytest.raises(ImageDataError, match="no folder at"):
        open_unlabelled(tmp_path / "none")


def test_the_report_says_that_labels_are_the_models_own(tmp_path: Path) -> None:
    """The demo's model on its clean images, flat in one folder."""
    from conftest import DEMO

    for image in sorted((DEMO / "clean").glob("*/*.jpg"))[::3]:
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / f"{image.parent.name}-{image.name}").write_bytes(image.read_bytes())
    arguments = ["scan", DEMO / "model", "--clean-dir", tmp_path / "flat", "--score", "lipschitz", "--mu", 3]
    assert "images but no class folders" in bshub_command(*arguments).stderr
    result = bshub_command(*arguments, "--unlabelled", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["model"]["labels"].startswith("the model's own answers, where it is at least 90 % sure: ")
    assert any("agreement with the model's own answers" in warning for warning in report["diagnosis"]["warnings"])
    assert 4 <= report["images"]["n"] < 34
    out = tmp_path / "out"
    options = ["--no-onnx", "--no-thumbnails", "--finetune-epochs", 0, "--json", "-o", out]
    result = bshub_command("sanitize", *arguments[1:], "--unlabelled", *options)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["model"]["labels"] == report["model"]["labels"]
    for name in ("README.md", "report.html", "bshub-report.json"):
        text = html.unescape((out / name).read_text(encoding="utf-8"))
        assert "the clean images have no labels: accuracy on them is agreement" in text, name


# --- data sets of the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(intake, "WAITS", (0.01, 0.01))
    monkeypatch.setattr("bshub.intake.datasets.WAITS", (0.01, 0.01))
    with LoopbackHub() as hub:
        point_client_at(hub.url, monkeypatch, tmp_path / "cache")
        yield hub


def seed(hub: LoopbackHub, root: Path) -> None:
    make_images(root / "train", NAMES)
    make_images(root / "test", NAMES, each=1)
    (root / "README.md").write_text("# a data set\n")
    (root / "set.py").write_text("raise SystemExit('run')\n")
    files = {name: data for name, data in contents(root).items() if (root / name).is_file()}
    hub.seed("me/set", files)
    hub.seed("me/set", files, revision="v1")


def test_a_data_set_of_the_hub_is_read_like_a_folder(hub: LoopbackHub, tmp_path: Path) -> None:
    seed(hub, tmp_path / "set")
    root, within = fetch_dataset("hf://datasets/me/set@v1/train")
    folder = open_folder(root, 3, NAMES, within=within)
    assert listing(folder) == listing(open_folder(tmp_path / "set" / "train", 3, NAMES))
    assert len(list(folder.read())) == 9
    assert not any("set.py" in request or "README" in request or "/test/" in request for request in hub.requests)
    assert not list((tmp_path / "cache").rglob("*.py"))
    asked = len(hub.requests)
    fetch_dataset("hf://datasets/me/set@v1/train")
    assert not any(request.startswith("GET") and "resolve" in request for request in hub.requests[asked:])


def test_links_out_of_the_data_set_are_not_followed(hub: LoopbackHub, tmp_path: Path) -> None:
    seed(hub, tmp_path / "set")
    root, within = fetch_dataset("hf://datasets/me/set/train")
    images(tmp_path, "secret.png")
    (root / "cat" / "s.png").symlink_to(tmp_path / "secret.png")
    assert len(open_folder(root, 3, NAMES, within=within)) == 9


def test_a_table_comes_with_its_images(hub: LoopbackHub, tmp_path: Path) -> None:
    root = tabled(tmp_path / "set", ROWS)
    hub.seed("me/tabled", {name: data for name, data in contents(root).items() if (root / name).is_file()})
    root, within = fetch_dataset("hf:/datasets/me/tabled")  # pathlib took a slash
    assert listing(open_folder(root, 3, NAMES, within=within)) == {"a.png": 2, "deep/b.png": 0, "deep/c.png": 2}


def test_the_command_takes_a_data_set(hub: LoopbackHub, tmp_path: Path) -> None:
    seed(hub, tmp_path / "set")
    model = make_model(tmp_path / "model")
    result = bshub_command("evaluate", model, "--test-dir", "hf://datasets/me/set/test", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["images"]["n"] == 3


def failed(reference: str) -> str:
    with pytest.raises(ImageDataError) as caught:
        fetch_dataset(reference)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_data_set_that_is_not_there_or_holds_something_else(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed(hub, tmp_path / "set")
    hub.seed("me/parquet", {"data/train-0.parquet": b"PAR1", "README.md": b""})
    assert "datasets/no/body is not on the Hub" in failed("hf://datasets/no/body")
    assert "holds no image files; it holds .md, .parquet" in failed("hf://datasets/me/parquet")
    assert "holds no image files" in failed("hf://datasets/me/set/nowhere")
    monkeypatch.setattr("bshub.intake.datasets.MAX_FILES", 5)
    assert "holds 12 images" in failed("hf://datasets/me/set")
    assert MAX_FILES > 5


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [(401, "", "hf auth login"), (403, "", "hf auth whoami"), (403, "GatedRepo", "accept its terms at http")]
    + [(404, "RevisionNotFound", "has no revision main"), (500, "", "the Hub failed (500)")],
)
def test_each_refusal_has_its_remedy(hub: LoopbackHub, tmp_path: Path, status: int, code: str, says: str) -> None:
    hub.fail("GET /api/datasets/", status, times=9, code=code)
    assert says in failed("hf://datasets/me/set")
    assert "--arch" not in failed("hf://datasets/me/set")


def test_a_passing_fault_is_waited_out(hub: LoopbackHub, tmp_path: Path) -> None:
    seed(hub, tmp_path / "set")
    hub.fail("GET /api/datasets/", 503, times=2)
    assert fetch_dataset("hf://datasets/me/set/test")[0].name == "test"


def test_without_a_network(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at("http://127.0.0.1:9", monkeypatch, tmp_path / "cache")
    assert "no connection to 127.0.0.1" in failed("hf://datasets/me/set")
    assert "a local folder works too" in failed("hf://datasets/me/set")


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("hf://datasets/me/set", ("me/set", None, "")),
        ("hf://datasets/me/set@v1/train/", ("me/set", "v1", "train")),
        ("hf://datasets/me/set@refs/pr/3/a/b", ("me/set", "refs/pr/3", "a/b")),
        ("hf:/datasets/me/set/a", ("me/set", None, "a")),
        ("hf://me/set", None),
        ("hf://datasets/me", None),
        ("hf://datasets/me/set/../../x", None),
        ("hf://datasets/a/..\\x", None),
        ("hf://datasets/me/set@../x", None),
        ("hf://spaces/me/set", None),
        ("hf:", None),
    ],
)
def test_the_form_of_a_data_set(reference: str, parts: object) -> None:
    if parts is None:
        with pytest.raises(ImageDataError):
            parse_dataset(reference)
    else:
        assert parse_dataset(reference) == parts


# --- what is converted is counted


def test_conversions_are_counted_once_however_often_the_folder_is_read(tmp_path: Path) -> None:
    make_images(tmp_path, NAMES)
    Image.new("CMYK", (8, 8)).save(tmp_path / "cat" / "c.tif")
    Image.new("RGBA", (8, 8), (9, 9, 9, 9)).save(tmp_path / "cat" / "t.png")
    Image.new("RGBA", (8, 8), (9, 9, 9, 255)).save(tmp_path / "cat" / "opaque.png")
    folder = open_folder(tmp_path, 3, NAMES)
    for _ in range(2):
        assert len(list(folder.read())) == 12
        assert folder.converted == Counter({"CMYK": 1, "transparency": 1})
