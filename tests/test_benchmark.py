"""The benchmark: what a row says, that rows survive a kill, and that tables are computed from rows."""

from __future__ import annotations

import json
import mmap
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bshub_command
from PIL import Image

from bshub.attack import AttackSettings, attack_to_folder
from bshub.benchmark.command import bench_to_folder
from bshub.benchmark.cost import costs
from bshub.benchmark.draws import draw
from bshub.benchmark.evidence import hit_rate, judge_statistics, spearman
from bshub.benchmark.grid import Grid, cells_of, chosen_tests, open_victim, unseen
from bshub.benchmark.methods import parse_method
from bshub.benchmark.page import results_page
from bshub.benchmark.plots import _by_count, _mu_curve, _trade
from bshub.benchmark.rows import Cell, Rows
from bshub.benchmark.summary import Group, groups, lines
from bshub.errors import UsageError
from bshub.intake.folders import open_folder

ARCH = "timm/resnet18?num_classes=3&stem=cifar&channels=4,4,8,8&input_size=16&mean=0.5,0.5,0.5&std=0.25,0.25,0.25"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 10)):
        for label, name in enumerate(("ant", "bee", "cow")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 120, (16, 16, 3)).astype(np.uint8)
                pixels[:, :, label] += 100
                Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return root


@pytest.fixture(scope="module")
def victims(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("zoo")
    for name, attack, rate in (("bad", "badnets", 0.2), ("good", "none", 0.0)):
        settings = AttackSettings(ARCH, attack, rate, epochs=3, batch_size=12, precision="fp32")
        attack_to_folder(settings, data, root / name)
    return root / "bad", root / "good"


def grid_of(victims: tuple[Path, ...], data: Path, *methods: str, **given: Any) -> Grid:
    return Grid(tuple(victims), data, methods, **{"per_class": (2,), "effort": 0.01, **given})


@pytest.fixture(scope="module")
def measured(victims: tuple[Path, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    bench_to_folder(grid_of(victims, data, "bshub:finetune_epochs=1", "clp", "ft", per_class=(2, 3)), out)
    return out


def test_every_cell_of_the_grid_has_one_row_with_what_was_counted(measured: Path) -> None:
    rows = [json.loads(line) for line in (measured / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * (2 + 1 + 2)  # clp looks at no image: one row for both counts
    for row in rows:
        assert row["after"]["accuracy"]["n"] == row["cell"]["test_images"] == 30
        assert ("asr" in row["after"]) == (row["cell"]["model"] == "bad")
        assert row["seconds"] > 0 and row["bare_step_seconds"] > 0
        assert row["clean_images"] == 3 * row["cell"]["per_class"]
        fell = row["before"]["accuracy"]["percent"] - row["after"]["accuracy"]["percent"]
        assert row["accuracy_lost"]["points"] == pytest.approx(fell, abs=0.02) and row["accuracy_lost"]["n"] == 30
        if "asr" in row["after"]:
            assert row["after"]["asr"]["n"] == 20  # those of the other two classes
            fallen = max(0, row["before"]["asr"]["percent"] - row["after"]["asr"]["percent"])
            lost = max(0, row["before"]["accuracy"]["percent"] - row["after"]["accuracy"]["percent"])
            assert row["der"] == pytest.approx((fallen / 100 - lost / 100 + 1) / 2, abs=1e-4)


def test_a_rerun_measures_nothing_twice_and_a_cut_row_is_measured_again(
    measured: Path, victims: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    text = (measured / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text[:-40])  # killed in the middle of the last row
    grid = grid_of(victims, data, "bshub:finetune_epochs=1", "clp", "ft", per_class=(2, 3))
    assert len(Rows(tmp_path / "rows.jsonl").rows) == 9
    bench_to_folder(grid, tmp_path)
    again = (tmp_path / "rows.jsonl").read_text()
    assert again.splitlines()[:9] == text.splitlines()[:9] and len(again.splitlines()) == 10
    last, before = (json.loads(lines.splitlines()[-1]) for lines in (again, text))
    assert last["cell"] == before["cell"] and last["after"] == before["after"]


def test_a_broken_row_in_the_middle_is_no_accident(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"cell": \n{}\n')
    with pytest.raises(UsageError, match="line 1"):
        Rows(tmp_path / "rows.jsonl")


def test_draws_are_nested_seeded_and_never_poisoned(victims: tuple[Path, Path], data: Path) -> None:
    folder, poisoned = open_folder(data / "train", 3, None), set(open_victim(victims[0]).record["poisoned"]["files"])
    assert poisoned
    one, ten = draw(folder, 1, 0, poisoned), draw(folder, 10, 0, poisoned)
    assert set(one) <= set(ten)
    assert len(ten) == 30 and {path.parent.name for path, _ in ten} == {"ant", "bee", "cow"}
    assert not {path.relative_to(folder.root).as_posix() for path, _ in ten} & poisoned
    assert draw(folder, 10, 0, poisoned) == ten != draw(folder, 10, 1, poisoned)
    with pytest.raises(UsageError, match="clean images"):
        draw(folder, 25, 0, poisoned)


def test_a_class_that_was_poisoned_to_the_last_image_draws_on_unmeasured_test_images(data: Path) -> None:
    folder, test = open_folder(data / "train", 3, None), open_folder(data / "test", 3, None)
    names = [path.relative_to(folder.root).as_posix() for path in folder.paths]
    poisoned = {name for name, label in zip(names, folder.labels, strict=True) if label == 0}
    chosen = chosen_tests(test, 12)
    measured = {test.paths[i] for i in chosen}
    drawn = draw(folder, 2, 0, poisoned, unseen(test, chosen))
    assert [label for _, label in drawn] == sorted(label for _, label in drawn) and len(drawn) % 2 == 0
    for path, label in drawn:
        assert path not in measured and path.is_relative_to(test.root if label == 0 else folder.root)
    rest = [(path, label) for path, label in drawn if label]
    assert rest == [(path, label) for path, label in draw(folder, 2, 0, set()) if label]


def test_a_model_trained_anew_is_measured_anew(victims: tuple[Path, Path], data: Path) -> None:
    victim = open_victim(victims[0])
    cell = cells_of(grid_of(victims, data, "ft"), victim, 30)[0]
    assert cell.weights == victim.weights and len(cell.weights) == 12
    assert cell.key() != Cell(**{**vars(cell), "weights": "0" * 12}).key()


def test_test_images_are_the_same_for_every_model(data: Path) -> None:
    folder = open_folder(data / "test", 3, None)
    assert chosen_tests(folder, 12) == chosen_tests(folder, 12)
    assert len(set(chosen_tests(folder, 12))) == 12
    assert chosen_tests(folder, None) == chosen_tests(folder, 999) == list(range(30))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [("nothing", "unknown method"), ("ft:speed=1", "no option"), ("ft:lr", "no option"), ("bshub:mu=high", "mu"),
     ("bshub:seed=1", "no option"), ("", "unknown method")],
)  # fmt: skip
def test_what_is_no_method_is_refused(text: str, fragment: str) -> None:
    with pytest.raises(UsageError, match=fragment):
        parse_method(text)


def test_options_reach_the_method() -> None:
    assert parse_method("anp:eps=0.2,iterations=3").options == {"eps": 0.2, "iterations": 3}
    assert parse_method("bshub:score=clp,mu=2.5").options == {"score": "clp", "mu": 2.5}


def row_of(model: str, method: str, asr: float | None, accuracy: float, seed: int = 0) -> dict[str, Any]:
    def rates(acc: float, success: float | None) -> dict[str, Any]:
        found = {"accuracy": {"percent": acc, "low": acc - 1, "high": acc + 1, "n": 100}}
        return found if success is None else {**found, "asr": {"percent": success, "low": 0.0, "high": 100.0, "n": 90}}

    before = rates(90.0, None if asr is None else 100.0)
    der = None if asr is None else ((100 - asr) / 100 - max(0, 90 - accuracy) / 100 + 1) / 2
    return {
        "cell": {"model": model, "weights": "w", "method": method, "per_class": 10, "seed": seed, "effort": 1.0,
                 "test_images": 100},
        "attack": "badnets", "rate": 0.1, "before": before, "after": rates(accuracy, asr), "der": der,
        "seconds": 2.0, "ratio": 4.0, "megabytes": None, "threads": 1, "notes": {},
    }  # fmt: skip


def test_a_method_is_the_mean_over_models_of_the_mean_over_draws() -> None:
    rows = [row_of("a", "x", 10, 89), row_of("a", "x", 30, 87, 1), row_of("b", "x", 0, 90), row_of("c", "x", None, 88)]
    (line,) = lines(groups(rows), 10)
    assert (line.models, line.asr, line.worst, line.drop, line.control) == (2, 10.0, 20.0, 1.0, 2.0)
    assert line.der == pytest.approx(((0.9 - 0.01 + 1) / 2 + (0.7 - 0.03 + 1) / 2) / 4 + 0.5)


def test_the_page_shows_intervals_of_one_draw_and_the_range_of_several() -> None:
    rows = [row_of("a", "x", 10, 89), row_of("a", "x", 30, 87, 1), row_of("b", "y", 5, 90)]
    page = results_page(rows, "make it")
    assert "88.0 (87.0–89.0, 2 draws)" in page
    assert "90.0 [89.0, 91.0]" in page
    assert "| x | 1 | 20.0 | 20.0 | 2.0 |" in page


def test_what_auto_chose_stands_beside_the_curve_of_as_many_images() -> None:
    def of(method: str, mu: float, per_class: int) -> dict[str, Any]:
        row = row_of("a", method, 10, 89)
        return {**row, "cell": {**row["cell"], "per_class": per_class}, "notes": {"mu": mu}}

    rows = [of("bshub:mu=1.0", 1.0, 10), of("bshub:mu=3.0", 3.0, 10), of("bshub", 2.0, 10), of("bshub", 5.0, 1)]
    assert {(point["mu"], point["chosen"]) for point in _mu_curve(groups(rows))} == {
        (1.0, False), (3.0, False), (2.0, True),
    }  # fmt: skip


def test_a_method_that_fails_leaves_its_reason(victims: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    rows = bench_to_folder(grid_of(victims[:1], data, "bshub:score=nonsense"), tmp_path)
    assert "unknown score" in rows[0]["failed"]
    assert "unknown score" in (tmp_path / "results.md").read_text()


def test_peak_memory_is_that_of_the_block() -> None:
    with costs() as cost, mmap.mmap(-1, 60_000_000) as held:  # pages that nothing has freed before
        held.write(b"x" * len(held))
    assert cost.megabytes is None or 40 < cost.megabytes < 400
    assert cost.seconds > 0


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_pearson_of_mean_ranks(seed: int) -> None:
    generator = random.Random(seed)
    a, b = ([float(generator.randint(0, 6)) for _ in range(20)] for _ in range(2))

    def rank(values: list[float]) -> list[float]:
        order = sorted(values)
        return [np.mean([i for i, v in enumerate(order) if v == value]) for value in values]

    wanted = np.corrcoef(rank(a), rank(b))[0, 1]
    assert spearman(torch.tensor(a), torch.tensor(b)) == pytest.approx(wanted)
    assert spearman(torch.tensor(a), torch.ones(20)) == 0


def test_hits_count_the_filters_that_both_put_first() -> None:
    change = torch.arange(40.0)
    assert hit_rate(change, change) == 1
    assert hit_rate(-change, change) == 0
    score = change.clone()
    score[39] = -1
    assert hit_rate(score, change) == 0.5


def test_the_change_that_the_trigger_makes_stands_beside_every_statistic(
    victims: tuple[Path, Path], data: Path
) -> None:
    victim = open_victim(victims[0])
    train, test = open_folder(data / "train", 3, None), open_folder(data / "test", 3, None)
    layers = judge_statistics(victim, train, test, [0, 10, 20], 2, 0)
    assert len(layers) == 21 and {"lipschitz", "unlearning", "low activation"} <= set(layers[0].spearman)
    for layer in layers:
        assert all(-1.0001 <= value <= 1.0001 for value in layer.spearman.values())
        assert all(0 <= value <= 1 for value in layer.hits.values())


def group(method: str, per_class: int, model: str = "m") -> Group:
    rates = {"accuracy": {"percent": 80.0}, "asr": {"percent": 90.0}}
    return Group(model, method, per_class, 1.0, ({"before": rates, "after": rates},), ())


def test_a_curve_over_numbers_of_images_is_of_the_same_models_everywhere() -> None:
    found = [group("bshub", count, model) for model in "ab" for count in (1, 10)]
    found += [group("bshub", 10, "c"), group("nad", 10, "a"), group("bshub:mu=2", 5, "a"), group("clp", 0, "a")]
    points = _by_count(found)
    assert {(p["method"], p["model"], p["per_class"]) for p in points} == {
        ("bshub", model, count) for model in "ab" for count in (1, 10)
    }


def test_the_trade_is_shown_for_one_number_of_images() -> None:
    found = [group("bshub", 0), group("bshub", 1), group("bshub", 10), group("nad", 10), group("clp", 0)]
    count, points = _trade([*found, group("bshub:mu=2", 10)])
    assert count == 10
    assert {(point["method"], point["per_class"]) for point in points} == {("bshub", 10), ("nad", 10), ("clp", 0)}


def test_the_command_prints_a_table_and_writes_rows(victims: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    result = bshub_command("bench", victims[0], "--data", data, "-o", tmp_path / "out", "--methods", "clp", "-q")
    assert result.exit_code == 0, result.stderr
    assert "clp" in result.stdout and "mean ASR" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rows.jsonl", "results.md", "trade.png"}
    wrong = bshub_command("bench", tmp_path, "--data", data, "-o", tmp_path / "other")
    assert wrong.exit_code == 2 and "bshub attack" in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_without_images_only_the_default_is_measured_beside_what_looks_at_weights(
    victims: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    grid = grid_of(victims[:1], data, "bshub:finetune_epochs=1,score='lipschitz'", "clp", "ft", "paper", per_class=(0,))
    rows = bench_to_folder(grid, tmp_path)
    assert sorted(row["cell"]["method"].partition(":")[0] for row in rows) == ["bshub", "clp"]
    assert all(row["clean_images"] == 0 and row["after"]["accuracy"]["n"] == 30 for row in rows)
    page = (tmp_path / "results.md").read_text()
    assert "## No clean images" in page and "| bshub:finetune_epochs=1,score='lipschitz' |" in page
    from_images = lines(groups([*rows, {**rows[0], "cell": {**rows[0]["cell"], "per_class": 5}}]), 5)
    assert {line.models for line in from_images} == {1}  # a row without images is no row of five a class
