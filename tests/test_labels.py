"""Names of classes become outputs of the model by a stated rule, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.data import ImageNetInfo

from bshub.errors import BshubError, ImageDataError, UsageError
from bshub.intake.labels import match_names, read_classes, twins

INFO = ImageNetInfo("imagenet-1k")
IDS = INFO.label_names()
WORDS = [text.partition(",")[0] for text in INFO.label_descriptions()]


def match(names: list[str], classes: int, labels: list[str] | None = None) -> tuple[list[int], str]:
    return match_names(names, classes, labels, what="class folders", whose="the model's labels")


def refused(names: list[str], classes: int, labels: list[str] | None = None) -> str:
    with pytest.raises(ImageDataError) as caught:
        match(names, classes, labels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def file(folder: Path, data: bytes | str) -> Path:
    (folder / "classes").write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / "classes"


@pytest.mark.parametrize(
    "data",
    ["dog\ncat\n", "dog\r\ncat", "  dog \n\tcat\n\n", "\ufeffdog\ncat\n", '["dog", "cat"]', '\n [" dog", "cat "]'],
)
def test_a_class_file_is_lines_or_a_json_list_in_the_models_order(tmp_path: Path, data: str) -> None:
    assert read_classes(file(tmp_path, data)) == ("dog", "cat")


def test_a_name_may_occur_twice_and_only_its_folder_is_refused(tmp_path: Path) -> None:
    names = list(read_classes(file(tmp_path, "crane\ndog\ncrane\n")))
    assert match(["dog"], 3, names) == ([1], "class folders matched to the model's labels")
    assert "'crane' is the name of several" in refused(["crane", "dog"], 3, names)


@pytest.mark.parametrize(
    "data",
    ["", "dog", "dog\n\ncat", "[1, 2]", '["dog", ""]', '["dog"]', '["a", "b"', b"\xff\xfe", "[" * 100_000]
    + ['["a", ["b"]]', "\n".join(map(str, range(1_000_001)))],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_class_file_is_refused(tmp_path: Path, data: bytes | str) -> None:
    with pytest.raises(UsageError) as caught:
        read_classes(file(tmp_path, data))
    assert str(caught.value).isprintable()


def test_missing_and_huge_class_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bshub.intake.labels._MAX_BYTES", 1 << 20)
    with pytest.raises(UsageError, match="No such file"):
        read_classes(tmp_path / "none")
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate((1 << 20) + 1)
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        read_classes(tmp_path / "huge")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.lists(st.text(max_size=4), max_size=5).map(json.dumps).map(str.encode))
def test_any_bytes_are_classes_or_one_kind_of_error(tmp_path: Path, data: bytes) -> None:
    try:
        names = read_classes(file(tmp_path, data))
    except BshubError:
        return
    assert len(names) >= 2 and all(name.strip() == name != "" for name in names)


def test_imagenet_folders_fit_whatever_names_the_library_gives_its_outputs() -> None:
    places = [0, 7, 999]
    ids, words = [IDS[k] for k in places], [WORDS[k] for k in places]
    for labels in (None, IDS, WORDS):
        assert match(ids, 1000, labels)[0] == places
    assert match(words, 1000, IDS) == (places, "class folders matched to ImageNet's class names")
    assert match(words, 1000, None)[0] == places
    assert match(ids, 1000, None) == (places, "class folders matched to ImageNet's WordNet ids")
    everything = sorted(IDS)
    assert match(everything, 1000, WORDS)[0] == [IDS.index(name) for name in everything]


def test_torchvisions_own_words_are_imagenets() -> None:
    from torchvision.models import ResNet18_Weights

    categories = ResNet18_Weights.DEFAULT.meta["categories"]
    assert match([IDS[3], IDS[500]], 1000, categories) == ([3, 500], "class folders matched to ImageNet's WordNet ids")


def test_a_thousand_other_classes_are_not_imagenet() -> None:
    labels = [f"type {k}" for k in range(1000)]
    assert "none of the model's labels" in refused([IDS[0], IDS[1]], 1000, labels)
    assert "do not fit a model with 999 classes" in refused([IDS[0], IDS[1]], 999)
    assert "do not fit a model with 1000 classes" in refused(["n00000000", "n00000001"], 1000)


def test_a_word_of_imagenet_that_means_two_classes_is_refused() -> None:
    assert WORDS.count("crane") == 2
    assert "do not fit" in refused(["crane", "goldfish"], 1000)


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (["a", "b"], None),
        (["cat", "Cat"], ("cat", "Cat")),
        (["caf\u00e9", "x", "cafe\u0301"], ("caf\u00e9", "cafe\u0301")),
    ],
)
def test_twins_are_names_that_some_file_systems_cannot_keep_apart(names: list[str], pair: object) -> None:
    assert twins(names) == pair
