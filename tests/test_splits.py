"""``--data``: real images in each layout come out as the class folders that everything else reads."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO
from PIL import Image
from torchvision import datasets

from bshub.errors import BshubError, ImageDataError, UsageError
from bshub.intake import splits, unpack
from bshub.intake.folders import ClassFolder
from bshub.intake.images import read_image
from bshub.intake.splits import find_splits

CLASSES = sorted(path.name for path in (DEMO / "clean").iterdir())[:3]
PICTURES = {name: sorted((DEMO / "clean" / name).iterdir())[:4] for name in CLASSES}


@pytest.fixture(autouse=True)
def assets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own."""
    folder = tmp_path_factory.mktemp("assets")
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(folder))
    return folder


def real(split: str) -> list[tuple[int, np.ndarray]]:
    """Class and pixels ``[32, 32, 3]`` of real images: three of each class to train on, one to test on."""
    part = slice(0, 3) if split == "train" else slice(3, 4)
    return [
        (label, read_image(path).permute(1, 2, 0).numpy())
        for label, name in enumerate(CLASSES)
        for path in PICTURES[name][part]
    ]


def seen(folder: ClassFolder) -> list[tuple[int, bytes]]:
    """Label and pixels of all images, in an order of their own."""
    return sorted((label, image.numpy().tobytes()) for image, label in folder.read())


def expected(split: str) -> list[tuple[int, bytes]]:
    return sorted((label, pixels.transpose(2, 0, 1).tobytes()) for label, pixels in real(split))


# --- each layout, as torchvision's own readers want it


def cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pickles, and their checksums where torchvision compares them."""
    folder = root / "cifar-100-python"
    folder.mkdir()
    entries: dict[str, dict[str, object]] = {"meta": {"fine_label_names": CLASSES}}
    for split in ("train", "test"):
        labels = [label for label, _ in real(split)]
        data = np.stack([pixels.transpose(2, 0, 1).reshape(-1) for _, pixels in real(split)])
        entries[split] = {"data": data, "fine_labels": labels, "coarse_labels": labels, "filenames": []}
    sums = {}
    for name, entry in entries.items():
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": sums["meta"]})


def gtsrb(root: Path) -> None:
    """Folders of PPM files to train on, a table beside those to test on."""
    for index, (label, pixels) in enumerate(real("train")):
        folder = root / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"00000_{index:05d}.ppm")
    tests = root / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    tests.mkdir(parents=True)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for index, (label, pixels) in enumerate(real("test")):
        Image.fromarray(pixels).save(tests / f"{index:05d}.ppm")
        rows.append(f"{index:05d}.ppm;32;32;5;5;27;27;{label}")
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(rows) + "\n")


def tiny_imagenet(root: Path) -> dict[str, int]:
    """WordNet ids, boxes beside the images, and a test split without labels."""
    ids = ["n01443537", "n01629819", "n01641577"]
    for index, (label, pixels) in enumerate(real("train")):
        folder = root / "train" / ids[label] / "images"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{ids[label]}_{index}.png")
        (root / "train" / ids[label] / f"{ids[label]}_boxes.txt").write_text(
            f"{ids[label]}_{index}.png\t0\t0\t31\t31\n"
        )
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for index, (label, pixels) in enumerate(real("test")):
        Image.fromarray(pixels).save(root / "val" / "images" / f"val_{index}.png")
        lines.append(f"val_{index}.png\t{ids[label]}\t0\t0\t31\t31\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "test" / "images").mkdir(parents=True)
    Image.fromarray(real("test")[0][1]).save(root / "test" / "images" / "test_0.png")
    return {name: label for label, name in enumerate(ids)}


def mnist(root: Path) -> None:
    """Four files of bytes behind a head of big-endian numbers; images are grey."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        grey = np.stack([pixels[2:30, 2:30, 1] for _, pixels in real(split)])
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, len(grey), 28, 28) + grey.tobytes()
        )
        labels = bytes(label for label, _ in real(split))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(labels)) + labels)


def test_cifar_100_as_torchvision_unpacks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar100(tmp_path, monkeypatch)
    # the walls would bind this process for good; that they stand is seen below, in a child
    for wall in ("limit_process", "forbid_natively", "forbid_python"):
        monkeypatch.setattr(unpack, wall, lambda *arguments: None)
    out = tmp_path / "out"
    out.mkdir()
    assert unpack.main(["CIFAR100", str(tmp_path), str(out)]) == 0
    found = find_splits(out)
    assert {path.name for path in found.train.iterdir()} == set(CLASSES)
    for split in ("train", "test"):
        assert seen(found.open(split, 3, CLASSES)) == expected(split)


def test_gtsrb_as_torchvision_unpacks_it(tmp_path: Path) -> None:
    gtsrb(tmp_path)
    found = find_splits(Path(f"torchvision/GTSRB?root={tmp_path}"))
    for split in ("train", "test"):
        assert seen(found.open(split, 43, None)) == expected(split)


def test_tiny_imagenet_as_it_is_unpacked_and_not_its_unlabelled_test_images(tmp_path: Path) -> None:
    labels = tiny_imagenet(tmp_path)
    found = find_splits(tmp_path)
    assert found.test.name == "val"
    for split in ("train", "test"):
        assert seen(found.open(split, 3, list(labels))) == expected(split)


def test_grey_images_become_colour(tmp_path: Path) -> None:
    mnist(tmp_path)
    found = find_splits(Path(f"torchvision/MNIST?root={tmp_path}"))
    folder = found.open("test", 10, datasets.MNIST.classes)
    assert sorted(folder.labels) == [0, 1, 2]
    images = {label: image for image, label in folder.read()}
    for label, pixels in real("test"):
        assert torch.equal(images[label], torch.from_numpy(pixels[2:30, 2:30, 1]).expand(3, 28, 28))


def test_the_digits_of_scikit_learn() -> None:
    found = find_splits(Path("sklearn/digits"))
    train, test = (found.open(split, 10, None) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    from sklearn.datasets import load_digits

    digits = load_digits()
    first = test.paths.index(found.test / str(digits.target[1437]) / "000000.png")
    levels = read_image(test.paths[first])[0].double() * 16 / 255
    assert torch.equal(levels.round(), torch.from_numpy(digits.images[1437]))
    assert test.labels[first] == digits.target[1437]


def test_a_data_set_is_unpacked_once_and_anew_when_its_files_change(tmp_path: Path) -> None:
    gtsrb(tmp_path)
    name = Path(f"torchvision/GTSRB?root={tmp_path}")
    first = find_splits(name)
    marker = first.train / "marker"
    marker.touch()
    assert find_splits(name) == first and marker.exists()
    extra = tmp_path / "gtsrb" / "GTSRB" / "Training" / "00002" / "00001_00000.ppm"
    Image.fromarray(real("test")[0][1]).save(extra)
    again = find_splits(name)
    assert again != first
    assert len(again.open("train", 43, None)) == len(first.open("train", 43, None)) + 1


# --- what is refused, and what a file of somebody else's cannot do


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.marker), "w")


def test_a_pickle_that_is_not_the_published_one_is_not_opened(tmp_path: Path, assets: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    marker = tmp_path / "marker"
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(ImageDataError, match="CIFAR100 cannot be read: Dataset not found or corrupted"):
        find_splits(Path(f"torchvision/CIFAR100?root={tmp_path}"))
    assert not marker.exists()
    assert not [path for path in assets.rglob("*") if path.is_file()]


def test_a_reader_that_is_taken_over_can_write_nowhere_else(tmp_path: Path) -> None:
    mnist(tmp_path)
    marker = tmp_path / "marker"
    # what torchvision opens with torch.load(weights_only=False) where an old version has left it
    (tmp_path / "MNIST" / "processed").mkdir()
    buffer = io.BytesIO()
    torch.save(Evil(marker), buffer)
    for name in ("training.pt", "test.pt"):
        (tmp_path / "MNIST" / "processed" / name).write_bytes(buffer.getvalue())
    try:
        find_splits(Path(f"torchvision/MNIST?root={tmp_path}"))
    except ImageDataError as error:
        assert error.hint
    assert not marker.exists()


@pytest.mark.parametrize("classes", [["../../x", "b"], ["a", "A"], ["a/b"], [], None, ["con\n"], ["a", "."]])
def test_names_that_are_no_folder_names_become_numbers(classes: list[str] | None) -> None:
    assert unpack.folder_names(classes) is None


@pytest.mark.parametrize(
    ("data", "error", "said", "hint"),
    [
        ("torchvision/CIFAR1000?root=x", UsageError, "knows no data set torchvision/CIFAR1000", "CIFAR100"),
        ("torchvision/CIFAR100", UsageError, "does not say where its files are", "torchvision/CIFAR100?root=DIR"),
        ("torchvision/CIFAR100?rot=x", UsageError, "does not say where its files are", "torchvision/CIFAR100?root=DIR"),
        ("torchvision/CIFAR100?root=nowhere", ImageDataError, "no folder cifar-100-python in", "download=True"),
        ("sklearn/digit", UsageError, "knows no data set sklearn/digit", "digits"),
        ("nowhere", UsageError, "nowhere has no folder train", "--data DIR holds"),
    ],
)
def test_what_there_is_not_is_refused(data: str, error: type[BshubError], said: str, hint: str) -> None:
    with pytest.raises(error) as caught:
        find_splits(Path(data))
    assert said in caught.value.message and hint in str(caught.value.hint)


def test_a_child_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gtsrb(tmp_path)
    monkeypatch.setattr(splits, "SECONDS", 0.05)
    with pytest.raises(ImageDataError, match="not unpacked within"):
        find_splits(Path(f"torchvision/GTSRB?root={tmp_path}"))


@pytest.mark.parametrize("text", ["val_0.png n01443537\n", "../x.png\tn01443537\n", "\n", ""])
def test_a_broken_table_of_tiny_imagenet_is_refused(tmp_path: Path, text: str) -> None:
    labels = tiny_imagenet(tmp_path)
    (tmp_path / "val" / "val_annotations.txt").write_text(text)
    with pytest.raises(ImageDataError) as caught:
        find_splits(tmp_path).open("test", 3, list(labels))
    assert "val_annotations.txt" in caught.value.message
