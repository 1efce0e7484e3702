"""37 to 45: folders of images."""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable

from bad.bench import ARCH, CLASSES, Bench, Case, Outcome, make_images
from bshub.errors import ImageDataError, InconclusiveError
from bshub.intake.folders import open_folder

FOLDS_CASE = sys.platform in ("darwin", "win32")


def measured(bench: Bench, **expected: object) -> Outcome:
    """The rates on the clean images, after checking what the report says of them."""
    outcome = bench.command("evaluate", bench.model, "--test-dir", bench.clean, "--json")
    report = json.loads(outcome.text)
    assert {key: report["images"].get(key) for key in expected} == expected
    return Outcome(outcome.error, outcome.code, report["model"]["labels"])


def order(bench: Bench) -> Outcome:
    """Alphabetically '10' comes before '2'."""
    root = make_images(bench.bad / "eleven", tuple(str(k) for k in range(11)), each=1)
    folder = open_folder(root, 11, None)
    assert {path.parent.name: label for path, label in zip(folder.paths, folder.labels, strict=True)} == {
        str(k): k for k in range(11)
    }
    return Outcome(None, 0, folder.matched)


def explicit_order(bench: Bench) -> Outcome:
    """Weights without label names, folders whose alphabet is not the model's order: the class file decides."""
    classes = bench.put("classes.txt", "dog\nbird\ncat\n")
    folder = bench.command(
        "evaluate", bench.weights, "--arch", ARCH, "--classes", classes, "--test-dir", bench.clean, "--json"
    )
    plain = bench.command("evaluate", bench.weights, "--arch", ARCH, "--test-dir", bench.clean, "--json")
    assert json.loads(plain.text)["model"]["labels"] == "class folders in alphabetical order"
    return folder


def not_the_models(bench: Bench) -> Outcome:
    (bench.clean / "dog").rename(bench.clean / "dgo")
    return bench.sanitize()


def empty_class(bench: Bench) -> Outcome:
    shutil.rmtree(bench.clean / "dog")
    (bench.clean / "dog").mkdir()
    return measured(bench, n=6, empty_classes=["dog"])


def only_empty(bench: Bench) -> Outcome:
    for name in CLASSES:
        shutil.rmtree(bench.clean / name)
        (bench.clean / name).mkdir()
    return bench.sanitize()


def leftovers(bench: Bench) -> Outcome:
    for junk in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(bench.clean / "cat", bench.clean / junk)
        shutil.copytree(bench.clean / "cat", bench.clean / "dog" / junk)
    return measured(bench, n=9)


def twins(one: str, other: str) -> Callable[[Bench], Outcome]:
    def run(bench: Bench) -> Outcome:
        root = make_images(bench.bad / "twins", (one, other))
        return bench.sanitize(clean=root)

    return run


def loop(bench: Bench) -> Outcome:
    (bench.clean / "cat" / "again").symlink_to(bench.clean, target_is_directory=True)
    (bench.clean / "cow").symlink_to(bench.clean / "cat", target_is_directory=True)
    return measured(bench, n=9)


def outside(bench: Bench) -> Outcome:
    make_images(bench.bad / "secret")
    (bench.clean / "cat" / "s.png").symlink_to(bench.bad / "secret" / "cat" / "0.png")
    return measured(bench, n=9)


def outside_by_table(bench: Bench) -> Outcome:
    bench.put("images/metadata.csv", "file_name,label\n../../clean/cat/0.png,cat\n")
    return bench.sanitize(clean=bench.bad / "images")


def pipes(bench: Bench) -> Outcome:
    os.mkfifo(bench.clean / "cat" / "pipe.png")
    (bench.clean / "cat" / "zero.png").symlink_to("/dev/zero")
    return measured(bench, n=9)


def pipe_by_table(bench: Bench) -> Outcome:
    (bench.bad / "images").mkdir()
    os.mkfifo(bench.bad / "images" / "pipe.png")
    bench.put("images/metadata.csv", "file_name,label\npipe.png,cat\n")
    return bench.sanitize(clean=bench.bad / "images")


def not_utf8(bench: Bench) -> Outcome:
    os.rename(bench.clean / "cat" / "0.png", os.fsencode(bench.clean) + b"/cat/\xff\xfe.png")
    return measured(bench, n=9)


def not_utf8_class(bench: Bench) -> Outcome:
    os.rename(bench.clean / "cat", os.fsencode(bench.clean) + b"/\xff")
    return bench.sanitize()


def labels(*names: str) -> Callable[[Bench], Outcome]:
    def run(bench: Bench) -> Outcome:
        return bench.sanitize(bench.weights, clean=make_images(bench.bad / "numbers", names))

    return run


def too_few(bench: Bench) -> Outcome:
    return bench.sanitize(clean=make_images(bench.bad / "few", ("cat",)))


def unsure(bench: Bench) -> Outcome:
    """Without labels and a model that is sure of nothing there is nothing to go by."""
    return bench.sanitize(None, "--unlabelled")


REFUSED = ImageDataError
NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
CASES = [
    Case(37, "folders 0 to 10", order, says="class folders read as label indices", silent=True),
    Case(37, "an order of their own", explicit_order, says="matched to the names in classes.txt", silent=True),
    Case(37, "a name the model lacks", not_the_models, REFUSED, "'dgo' is none of the model's labels", 2, silent=True),
    Case(38, "empty class", empty_class, says="matched to the model's labels"),
    Case(38, "only empty classes", only_empty, REFUSED, "hold no images", 2),
    Case(39, ".ipynb_checkpoints", leftovers, says="matched to the model's labels", silent=True),
    Case(40, "NFC and NFD twins", twins(NFC, NFD), REFUSED, "differ only in spelling", 2),
    Case(41, "symlink loop", loop, says="matched to the model's labels", silent=True),
    Case(41, "link out of the folder", outside, says="matched to the model's labels", silent=True),
    Case(41, "table row out of the folder", outside_by_table, REFUSED, "leads out of the folder", 2, silent=True),
    Case(42, "FIFO and device", pipes, says="matched to the model's labels"),
    Case(42, "FIFO in a table", pipe_by_table, InconclusiveError, "no image under", 3),
    Case(43, "file name that is not UTF-8", not_utf8, says="matched to the model's labels"),
    Case(43, "class that is not UTF-8", not_utf8_class, REFUSED, r"\udcff", 2),
    Case(44, "label out of range", labels("0", "7"), REFUSED, "are not indices of 3 classes", 2),
    Case(44, "one index twice", labels("1", "01"), REFUSED, "are not indices of 3 classes", 2),
    Case(45, "three images", too_few, InconclusiveError, "3 clean images are too few", 3),
    Case(45, "no confident answer", unsure, InconclusiveError, "is not 90 % sure of any image", 3),
]
if not FOLDS_CASE:
    CASES.insert(6, Case(40, "case twins", twins("cat", "Cat"), REFUSED, "differ only in spelling", 2))
