"""Class folders → labels of the model, and what must never become a class or an image."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from bshub.errors import ImageDataError
from bshub.intake.folders import ClassFolder, open_folder

needs_links = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX file systems only")
needs_case = pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="the file system folds case")


def put(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name) * 5 % 256, 0, 0)).save(path, "PNG")
    return root


def listing(folder: ClassFolder) -> dict[str, int]:
    return {
        path.relative_to(folder.root).as_posix(): label for path, label in zip(folder.paths, folder.labels, strict=True)
    }


def refused(root: Path, classes: int = 2, labels: tuple[str, ...] | None = None) -> ImageDataError:
    with pytest.raises(ImageDataError) as caught:
        open_folder(root, classes, labels)
    assert "\n" not in str(caught.value)
    return caught.value


def test_names_are_matched_to_the_models_labels_in_any_order(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "Dog/1.png", "airplane/1.png")
    folder = open_folder(tmp_path, 3, ("dog", "airplane", "cat"))
    assert listing(folder) == {"cat/1.png": 2, "Dog/1.png": 0, "airplane/1.png": 1}
    assert "labels" in folder.matched


def test_a_subset_of_the_classes_will_do(tmp_path: Path) -> None:
    folder = open_folder(put(tmp_path, "dog/1.png", "cat/1.png"), 4, ("bird", "cat", "cow", "dog"))
    assert listing(folder) == {"dog/1.png": 3, "cat/1.png": 1}


def test_labels_match_in_either_unicode_form(tmp_path: Path) -> None:
    folder = open_folder(put(tmp_path, "cafe\u0301/1.png", "tea/1.png"), 2, ("tea", "caf\u00e9"))
    assert sorted(folder.labels) == [0, 1]
    assert folder.labels[[p.parent.name for p in folder.paths].index("cafe\u0301")] == 1


def test_labels_that_differ_only_in_case_are_not_confused(tmp_path: Path) -> None:
    folder = open_folder(put(tmp_path, "Cardigan/1.png", "tabby/1.png"), 3, ("Cardigan", "tabby", "cardigan"))
    assert listing(folder) == {"Cardigan/1.png": 0, "tabby/1.png": 1}


def test_ten_comes_after_two(tmp_path: Path) -> None:
    """Alphabetically '10' < '2'; a folder per index means the index."""
    put(tmp_path, *(f"{index}/x.png" for index in range(11)))
    folder = open_folder(tmp_path, 11, None)
    assert listing(folder) == {f"{index}/x.png": index for index in range(11)}
    assert "indices" in folder.matched


def test_indices_work_beside_labels_and_as_a_subset(tmp_path: Path) -> None:
    assert listing(open_folder(put(tmp_path, "2/x.png", "00/x.png"), 3, ("a", "b", "c"))) == {
        "2/x.png": 2,
        "00/x.png": 0,
    }


@pytest.mark.parametrize(("names", "classes"), [(("0", "7"), 5), (("1", "01"), 5), (("-1", "0"), 3), (("0", "x"), 5)])
def test_labels_out_of_range_or_ambiguous_are_refused(tmp_path: Path, names: tuple[str, ...], classes: int) -> None:
    error = refused(put(tmp_path, *(f"{name}/x.png" for name in names)), classes)
    assert f"{classes} classes" in error.message


def test_without_labels_the_alphabet_decides_only_where_the_count_fits(tmp_path: Path) -> None:
    put(tmp_path, "b/x.png", "a/x.png")
    assert listing(open_folder(tmp_path, 2, None)) == {"a/x.png": 0, "b/x.png": 1}
    assert "alphabetical" in open_folder(tmp_path, 2, None).matched
    assert "2 class folders" in refused(tmp_path, 3).message


def test_a_folder_that_is_no_label_is_named(tmp_path: Path) -> None:
    error = refused(put(tmp_path, "cat/x.png", "dgo/x.png"), 2, ("cat", "dog"))
    assert "'dgo'" in error.message
    assert "cat, dog" in error.message


@pytest.mark.parametrize("junk", [".ipynb_checkpoints", "__MACOSX", ".git", "__pycache__"])
def test_leftovers_of_tools_are_no_class(tmp_path: Path, junk: str) -> None:
    put(tmp_path, "a/x.png", "b/x.png", f"{junk}/y.png", f"a/{junk}/x-checkpoint.png", "b/._x.png")
    assert listing(open_folder(tmp_path, 2, None)) == {"a/x.png": 0, "b/x.png": 1}


def test_leftovers_are_ignored_at_any_depth(tmp_path: Path) -> None:
    put(tmp_path, "a/x.png", "b/x.png", "a/.ipynb_checkpoints/sub/x.png")
    assert listing(open_folder(tmp_path, 2, None)) == {"a/x.png": 0, "b/x.png": 1}


def test_a_root_with_a_hidden_name_is_the_users_choice(tmp_path: Path) -> None:
    assert len(open_folder(put(tmp_path / ".hidden", "a/x.png", "b/x.png"), 2, None)) == 2


def test_other_files_are_no_images_and_subfolders_are_followed(tmp_path: Path) -> None:
    put(tmp_path, "a/x.PNG", "a/deep/y.jpeg", "b/x.png")
    (tmp_path / "a" / "notes.txt").write_text("hello")
    (tmp_path / "labels.csv").write_text("a,b")
    assert listing(open_folder(tmp_path, 2, None)) == {"a/deep/y.jpeg": 0, "a/x.PNG": 0, "b/x.png": 1}


@needs_case
@pytest.mark.parametrize("pair", [("cat", "Cat"), ("caf\u00e9", "cafe\u0301"), ("straße", "STRASSE")])
def test_twins_are_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    assert "differ only in spelling" in refused(put(tmp_path, f"{pair[0]}/x.png", f"{pair[1]}/x.png")).message


@needs_links
def test_a_symlink_loop_neither_hangs_nor_multiplies(tmp_path: Path) -> None:
    put(tmp_path, "a/x.png", "b/x.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "c").symlink_to(tmp_path / "a", target_is_directory=True)
    assert listing(open_folder(tmp_path, 2, None)) == {"a/x.png": 0, "b/x.png": 1}


@needs_links
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "secret", "s.png")
    root = put(tmp_path / "data", "a/x.png", "b/x.png")
    (root / "a" / "s.png").symlink_to(tmp_path / "secret" / "s.png")
    (root / "a" / "inside.png").symlink_to(root / "a" / "x.png")
    (root / "a" / "broken.png").symlink_to(root / "nowhere.png")
    assert listing(open_folder(root, 2, None)) == {"a/inside.png": 0, "a/x.png": 0, "b/x.png": 1}


@needs_links
def test_a_link_to_itself_is_no_image(tmp_path: Path) -> None:
    root = put(tmp_path, "a/x.png", "b/x.png")
    (root / "a" / "self.png").symlink_to(root / "a" / "self.png")
    assert listing(open_folder(root, 2, None)) == {"a/x.png": 0, "b/x.png": 1}


@needs_links
def test_fifos_and_folders_with_image_names_are_no_images(tmp_path: Path) -> None:
    root = put(tmp_path, "a/x.png", "b/x.png")
    os.mkfifo(root / "a" / "pipe.png")
    (root / "b" / "folder.png").mkdir()
    assert listing(open_folder(root, 2, None)) == {"a/x.png": 0, "b/x.png": 1}


@needs_case
def test_names_that_are_not_utf8_are_read_and_printed_safely(tmp_path: Path) -> None:
    put(tmp_path, "a/x.png", "b/x.png")
    os.rename(tmp_path / "a" / "x.png", os.fsencode(tmp_path) + b"/a/\xff\xfe.png")
    folder = open_folder(tmp_path, 2, None)
    assert len(list(folder.read())) == 2
    os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/\xff")
    refused(tmp_path, 3).message.encode("utf-8")


def test_missing_empty_and_flat_folders_are_told_apart(tmp_path: Path) -> None:
    assert "no folder at" in refused(tmp_path / "nowhere").message
    assert "no class folders" in refused(tmp_path).message
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert "hold no images" in refused(tmp_path).message
    assert "images but no class folders" in refused(put(tmp_path / "flat", "x.png")).message
    assert "not a folder" in refused(put(tmp_path, "x.png") / "x.png").message


def test_an_empty_class_is_allowed_beside_a_full_one(tmp_path: Path) -> None:
    put(tmp_path, "a/x.png")
    (tmp_path / "b").mkdir()
    assert listing(open_folder(tmp_path, 2, None)) == {"a/x.png": 0}


@pytest.mark.parametrize(("good", "bad", "passes"), [(2, 1, True), (2, 2, False), (18, 2, True), (17, 3, False)])
def test_unreadable_images_are_set_aside_up_to_a_quota(tmp_path: Path, good: int, bad: int, passes: bool) -> None:
    put(tmp_path, *(f"a/good{k:02}.png" for k in range(good)))
    for k in range(bad):
        (tmp_path / "a" / f"bad{k}.jpg").write_bytes(b"<html>" if k % 2 else b"")
    folder = open_folder(tmp_path, 2, ("a", "b"))
    if passes:
        assert len(list(folder.read())) == good
        assert {path.name for path in folder.rejected} == {f"bad{k}.jpg" for k in range(bad)}
        assert all(folder.rejected.values())
    else:
        with pytest.raises(ImageDataError, match="cannot be read"):
            list(folder.read())


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batches_keep_order_labels_and_the_last_rest(tmp_path: Path, size: int) -> None:
    put(tmp_path, *(f"{c}/{k}.png" for c in "ab" for k in range(3)))
    folder = open_folder(tmp_path, 2, None)
    batches = list(folder.batches(lambda image: image.float(), size))
    assert [len(labels) for _, labels in batches] == [size] * (6 // size) + ([6 % size] if 6 % size else [])
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    singles = torch.stack([image.float() for image, _ in folder.read()])
    assert torch.equal(torch.cat([images for images, _ in batches]), singles)
