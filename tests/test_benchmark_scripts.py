"""The scripts behind the pages of figures: a small corner really runs, and no page says what its rows do not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from little_nets import coloured_images
from nets import randomize_batch_norm
from PIL import Image
from torch import nn

from bshub.benchmark.summary import Group

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SCRIPTS = ROOT / "examples" / "benchmark"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_quick_corner_measures_and_a_rerun_measures_nothing_twice(tmp_path: Path) -> None:
    out = tmp_path / "quick"
    command = [sys.executable, str(SCRIPTS / "quick.py"), "--out", str(out), "--methods", "clp", "bshub:mu=2.5"]
    command += ["--per-class", "1", "--test-images", "60"]
    told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert re.search(r"clp, 0 per class: accuracy [\d.]+, asr [\d.]+, ra [\d.]+", told)
    assert re.search(r"bshub:mu=2.5, 1 per class: accuracy [\d.]+", told)
    before = (out / "rows.jsonl").read_bytes()
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert (out / "rows.jsonl").read_bytes() == before


def test_the_results_are_those_of_their_rows(tmp_path: Path) -> None:
    from experiments import EXPERIMENTS
    from results_page import page

    folder = tmp_path / "results"
    folder.mkdir()
    (tmp_path / "starter-results.md").touch()
    found, evidence = rows(DOCS / "results" / "rows.jsonl"), rows(DOCS / "results" / "evidence.jsonl")
    assert page(found, evidence, EXPERIMENTS, tmp_path / "results.md") == (DOCS / "results.md").read_text()
    shown = re.findall(r"\]\((results/[^)]+\.png)\)", (DOCS / "results.md").read_text())
    assert shown
    assert all((DOCS / picture).exists() for picture in shown)


def test_without_rows_the_page_says_so(tmp_path: Path) -> None:
    from experiments import EXPERIMENTS
    from results_page import page

    text = page([], [], EXPERIMENTS, tmp_path / "results.md")
    assert text.count("Not measured yet.") == 11


def test_the_performance_page_is_that_of_its_rows() -> None:
    from performance_page import PARTS, page

    found = rows(DOCS / "performance.jsonl")
    assert page(found) == (DOCS / "performance.md").read_text()
    assert {row["part"] for row in found} == set(PARTS)


def test_the_starters_page_is_that_of_its_rows() -> None:
    from starters import page

    assert page(rows(DOCS / "starter-results.jsonl")) == (DOCS / "starter-results.md").read_text()


def test_a_doubled_network_has_twice_the_filters_and_computes_the_same() -> None:
    from full_width import doubled

    model = timm.create_model("resnet18", num_classes=10, channels=(8, 16, 24, 32))
    model = randomize_batch_norm(model)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    same, noisy = doubled(model, noise=0), doubled(model)
    torch.testing.assert_close(same(images), model(images), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(noisy(images), model(images), rtol=1e-4, atol=1e-4)
    assert same.layer4[1].conv2.weight.shape == (64, 64, 3, 3) and same.conv1.weight.shape == model.conv1.weight.shape
    narrow, wide = (sum(p.numel() for p in net.layer4.parameters()) for net in (model, same))
    assert 3.8 * narrow < wide < 4 * narrow


def test_the_demo_as_a_victim_names_the_images_that_were_poisoned(tmp_path: Path) -> None:
    from demo import as_victim

    from bshub.benchmark.grid import open_victim

    for name in ("airplane", "bird", "cat"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(40):
            (tmp_path / "train" / name / f"{index:02}.jpg").touch()
    victim = open_victim(as_victim(tmp_path / "demo", tmp_path / "train"))
    files = victim.record["poisoned"]["files"]
    assert len(set(files)) == round(0.05 * 120) and all((tmp_path / "train" / file).exists() for file in files)
    assert not any(file.startswith("airplane/") for file in files), "the target's own images are not poisoned"
    assert victim.record["rate"] == 0.05 and victim.trigger is not None and victim.trigger.target == 0


def test_shorter_filters_give_the_same_answers_and_a_step_turns_them_further(trained: nn.Module) -> None:
    from shorten import shortened, squared_length

    images, labels = coloured_images(20)
    trained = randomize_batch_norm(trained)
    short = shortened(trained, (3, *images.shape[2:]), factor=4.0)
    torch.testing.assert_close(short(images), trained(images), rtol=1e-4, atol=1e-4)
    assert squared_length(short) == pytest.approx(squared_length(trained) / 4)

    def turned(model: nn.Module) -> float:
        model.train()
        weight = next(module.weight for module in model.modules() if isinstance(module, nn.Conv2d))
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), weight)
        return float((slope.flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)).mean())

    assert turned(short) == pytest.approx(4 * turned(trained), rel=0.05)


def test_the_reach_of_a_perturbation_is_counted_on_the_images_of_other_classes(trained: nn.Module) -> None:
    from i_bau_reach import reach

    images, _ = coloured_images(30)
    for parameter in trained.fc.parameters():  # less sure of itself, with the same answers: there is a slope
        parameter.data *= 0.05
    labels = trained.eval()(images).argmax(1).detach()
    told = reach(trained, images, labels, target=1, steps=3)
    assert told["n"] == int((labels != 1).sum()) < 30
    assert told["right"]["before"] == 100 and told["target"]["before"] == 0, "the labels are its own answers"
    assert told["rms"] > 0
    assert reach(trained, images, labels, target=1, steps=60)["right"]["after"] < 100


def test_every_model_of_an_experiment_is_in_the_zoo() -> None:
    from experiments import EXPERIMENTS
    from shorten import SHORT
    from zoo import models

    names = [row["name"] for row in models()]
    assert len(names) == len(set(names))
    assert {model for wanted in EXPERIMENTS.values() for model in wanted.models} <= {*names, "demo", SHORT}


def test_the_zoo_trains_on_a_fixed_part_of_every_class(tmp_path: Path) -> None:
    from zoo import subset

    for split, count in (("train", 7), ("test", 3)):
        for name in ("cat", "dog"):
            for index in range(count):
                file = tmp_path / "data" / split / name / f"{index}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"x")
    out = subset(tmp_path / "data", tmp_path / "part", 10)
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.jpg"))
    assert [file for file in files if file.startswith("train/cat")] == [f"train/cat/{index}.jpg" for index in range(5)]
    assert len(files) == 2 * 5 + 2 * 3


def test_every_architecture_of_the_zoo_can_be_built() -> None:
    from zoo import ARCHITECTURES, architecture, models

    from bshub.intake.build import build
    from bshub.intake.reference import parse_architecture

    assert {row["arch"] for row in models()} == set(ARCHITECTURES)
    for name in ARCHITECTURES:
        module, config, _ = build(parse_architecture(architecture(name, 4)), 10)
        side = 64 if name.endswith("-64px") else 32
        assert tuple(config["input_size"]) == (3, side, side)
        assert module(torch.zeros(2, 3, side, side)).shape == (2, 10)


def test_clean_images_that_show_a_patch_by_nature_are_counted(tmp_path: Path) -> None:
    from natural_patches import CLASSES, shares

    for index in range(CLASSES):
        file = tmp_path / "train" / str(index) / "0.png"
        file.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32), (255, 255, 255) if index < 3 else (40, 90, 250)).save(file)
    assert shares(tmp_path)["percent"] == {"checker": 0.0, "white": 30.0}


def test_methods_are_compared_on_the_models_they_share() -> None:
    from methods_page import methods_table

    def rates(accuracy: float, asr: float | None) -> dict[str, Any]:
        found = {"accuracy": accuracy} | ({"asr": asr} if asr is not None else {})
        return {name: {"percent": value, "low": value, "high": value} for name, value in found.items()}

    def group(model: str, method: str, asr: float | None) -> Group:
        cost = {"der": 0.5, "seconds": 1.0, "ratio": 2.0, "megabytes": 3.0}
        row = {"before": rates(72.0, asr and 100.0), "after": rates(70.0, asr), **cost}
        return Group(model, method, 10, 1.0, (row,), ())

    found = [group(model, method, asr) for model, asr in (("a", 4.0), ("b", 8.0), ("c", None)) for method in "xy"]
    found += [group("a", "z", 2.0)]
    text = "\n".join(methods_table(found, SimpleNamespace(per_class=(10,))))
    everyone, fewer = text.split("Means over ")
    assert "On a, 10 clean images per class:" in everyone
    assert {line.split()[1] for line in everyone.splitlines() if line.startswith("| ")} == {"method", "x", "y", "z"}
    assert fewer.startswith("2 backdoored models (a, b)")
    assert "| x | 6.0 | 8.0 | 2.0 | 2.0 |" in fewer
    assert "| z |" not in fewer.partition("### Every model")[0]


def test_hardening_is_no_false_alarm_and_stands_beside_the_default_as_a_row_of_its_own() -> None:
    from bars_page import bars
    from default_page import false_alarms
    from hardening_page import HARDENED, hardening_table

    def group(model: str, method: str, asr: tuple[float, float] | None, lost: float, done: bool = False) -> Group:
        def rates(accuracy: float, asr: float | None) -> dict[str, Any]:
            return {"accuracy": {"percent": accuracy}} | ({"asr": {"percent": asr}} if asr is not None else {})

        cell = {"model": model, "seed": 0, "per_class": 10}
        notes = {"counts": {"flagged": 0}, "repaired": done, "seconds": {"hardening": 1.0} if done else {}}
        before, after = rates(80.0, asr and asr[0]), rates(80.0 - lost, asr and asr[1])
        row = {"cell": cell, "before": before, "after": after, "notes": notes, "der": 0.5, "seconds": 1.0}
        return Group(model, method, 10, 0.1, ({**row, "ratio": 1.0, "megabytes": 1.0},), ())

    default = [
        group("sig-1", "bshub", (40, 40), 0),
        group("badnets-10", "bshub", (100, 2), 1),
        group("clean", "bshub", None, 0),
    ]
    hardened = [group("sig-1", HARDENED, (40, 20), 0.5, True), group("clean", HARDENED, None, 0.25, True)]
    table = "\n".join(bars([*default, *hardened], (10,)))
    assert "| all attacked | 2 | 70.0 | 21.0 | 40.0 | 0.5 | 0.0 |" in table
    assert "| *--harden* | 2 | 70.0 | 11.0 | 20.0 | 0.8 | 0.2 |" in table
    assert "*--harden*" not in "\n".join(bars(default, (10,)))
    assert "| sig-1 | 10 | 1 | 1 | 40.0 → 20.0 | 80.0 → 79.5 | 0.5 |" in hardening_table(hardened)
    alarms = [Group(g.model, "bshub", 10, 0.1, g.rows, ()) for g in hardened]
    assert "found something in 0 of 1 runs" in " ".join(false_alarms(alarms))


def test_a_part_is_left_out_for_as_long_as_it_is_asked_for_and_no_other_with_it() -> None:
    from left_out import PARTS

    from bshub import diagnosis
    from bshub.repair import lesson
    from bshub.repair.finetune import REPAIRS
    from bshub.scoring import confirmation
    from bshub.scoring.families import FAMILIES

    def parts() -> dict[str, Any]:
        there = {name: name in FAMILIES for name in ("waves", "patch", "additive", "warp")}
        repair = {"mixes": REPAIRS["distil"].mixes, "strongest": lesson.STRONGEST}
        return {**there, **repair, "like": confirmation.LIKE, "memory": diagnosis._shifted}

    whole, found = parts(), set()
    for part in PARTS.values():
        with part.taken_out():
            missing = {name for name, value in parts().items() if value != whole[name]}
        assert len(missing) == 1 and parts() == whole
        found |= missing
    assert found == set(whole)


def test_what_is_left_out_has_a_row_of_its_own(tmp_path: Path) -> None:
    from left_out import Renamed

    from bshub.benchmark.rows import Cell, Rows

    rows = Rows(tmp_path / "rows.jsonl")
    cell = Cell("badnets-10", "0123", "bshub", 10, 0, 0.1, 2000)
    renamed = Renamed(rows, "bshub-warp")
    assert cell not in renamed
    renamed.add(cell, {"der": 1.0})
    assert cell in renamed and cell not in rows
    assert rows.rows[0]["cell"]["method"] == "bshub-warp"


def test_the_ends_of_a_mean_are_means_of_the_ends_and_missing_where_a_row_does_not_tell_them() -> None:
    from bars_page import bars

    def group(model: str, asr: float | None, told: bool) -> Group:
        def rates(asr: float | None) -> dict[str, Any]:
            attacked = {} if asr is None else {"asr": {"percent": asr, "low": asr - 1, "high": asr + 3, "n": 9}}
            return {"accuracy": {"percent": 80.0, "n": 10}} | attacked

        lost = {"accuracy_lost": {"points": 0.0, "low": -1.0, "high": 2.0}} if told else {}
        cost = {"der": 0.5, "seconds": 1.0, "ratio": 1.0, "megabytes": 1.0}
        return Group(model, "bshub", 10, 0.1, ({"before": rates(asr), "after": rates(asr), **lost, **cost},), ())

    mine = [group("badnets-10", 4.0, True), group("sig-1", 8.0, True), group("clean", None, True)]
    table = "\n".join(bars(mine, (10,)))
    figures = "| 6.0 [5.0, 9.0] | 8.0 [7.0, 11.0] | 0.0 [-1.0, 2.0] | 0.0 [-1.0, 2.0] | 0.500 |"
    assert f"| 10 | all attacked | 2 | 6.0 {figures}" in table
    mine[1] = group("sig-1", 8.0, False)
    table = "\n".join(bars(mine, (10,)))
    assert "| 8.0 [7.0, 11.0] | 0.0 | 0.0 [-1.0, 2.0] | 0.500 |" in table
