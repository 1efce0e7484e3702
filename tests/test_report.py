"""The report page: what the run found, nothing else, in one file that asks nobody for anything."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BY_WEIGHTS, DEMO, Artifact, bshub_command
from little_nets import Mixed, coloured_images, same, snapshot
from PIL import Image
from torch import nn

import bshub
from bshub.clean import CleanImages
from bshub.intake.preprocessing import make_preprocessing
from bshub.release.evidence import Evidence, Layer, gather
from bshub.release.report import report_page, write_plots
from bshub.scoring.selection import MU_NOTHING, Threshold
from bshub.settings import Settings

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e{{7*7}}"
RATE = {"percent": 50.0, "low": 40.0, "high": 60.0, "n": 10}


class Elements(HTMLParser):
    """Elements with their attributes, and the text of scripts by type."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = f"{tag} {dict(attrs).get('type', '')}"

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script application/json":
            self.data.append(data)

    @property
    def charts(self) -> list[dict[str, Any]]:
        """Specifications in the order of the page."""
        return [json.loads(text) for text in self.data]

    def count(self, tag: str) -> int:
        """How many of them."""
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def page(complete: Artifact) -> str:
    return (complete.folder / "report.html").read_text(encoding="utf-8")


def a_report(**more: Any) -> dict[str, Any]:
    counts = {"flagged": 2, "removed": 1, "silenced": 1, "followers": 1}
    return {
        "model": {"reference": "timm/x"},
        "settings": {"budget": 5.0, "repair": "distil", "finetune_epochs": 1, "seed": 0, "batch_size": 4},
        "diagnosis": {"filters": 6, "score": "lipschitz", "threshold": {"mu": 2.0, "reason": "given"}, "flagged": {}},
        "counts": counts, "stays": {}, "refused": [], "repaired": True, "warnings": [], "seconds": {"trace": 0.5},
        "proof": {"images": 4, "error": 1e-7, "bound": 1e-5, "dtype": "float32"},
        "clean_images": {"n": 4, "accuracy_before": RATE, "accuracy_after": RATE},
        "parameters": {"before": 100, "after": 90}, "macs": {"before": 10**9, "after": 9 * 10**8},
        "versions": {"bshub": "0"}, **more,
    }  # fmt: skip


def some_evidence(name: str = "conv", classes: int = 3, curve: bool = True) -> Evidence:
    layer = Layer(
        name, [0, 1, 2, 3], [-1.0, 0.1, 2.5, 3.0], ["kept", "left with them", "silenced", "removed"],
        {"spectral": [1.0, 2.0, 3.0, float("inf")]},
    )  # fmt: skip
    labels = [index % classes for index in range(2 * classes)]
    tried = ((3.0, 1, 0.9), (2.0, 2, 0.8)) if curve else ()
    return Evidence([layer], Threshold(2.0, "given", tried, 0.8 if curve else None), labels, labels[::-1], labels, [])


def test_every_filter_that_did_not_stay_is_drawn_with_its_numbers(page: str, complete: Artifact) -> None:
    chart = Elements(page).charts[0]
    rows = [row for data in (layer["data"]["values"] for layer in chart["layer"]) for row in data if "fate" in row]
    drawn = {(row["layer"], row["filter"]): row for row in rows}
    report = complete.report
    for fate, key in (("removed", "removed"), ("silenced", "silenced"), ("left with them", "followers")):
        wanted = {(name, index) for name, filters in report[key].items() for index in filters}
        assert {place for place, row in drawn.items() if row["fate"] == fate} == wanted
    for row in drawn.values():
        assert row["fate"] in ("kept", "left with them") or row["score"] > report["diagnosis"]["threshold"]["mu"]
        assert {"spectral", "saliency", "activation", "correlation", "bn_shift"} <= row.keys()
    tooltip = {entry["field"] for entry in chart["layer"][2]["encoding"]["tooltip"]}
    assert {"layer", "filter", "fate", "score", "spectral", "correlation"} <= tooltip
    assert len({row["layer"] for row in rows}) == report["diagnosis"]["pairs"]


def test_the_page_asks_nobody_for_anything(page: str) -> None:
    elements = Elements(page)
    policy = next(a["content"] for tag, a in elements.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "'unsafe-inline'" not in policy.split("script")[1]
    for tag, attributes in elements.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            address = attributes.get(name)
            assert address is None or address.startswith("data:"), (tag, address)
    assert "@import" not in page and "url(" not in page.split("</style>")[0]
    assert 0.5e6 < len(page) < 3e6


def test_clean_images_are_shown_for_the_most_suspicious_filters(page: str, complete: Artifact) -> None:
    shown = complete.report["page"]["clean_images_shown"]
    assert Elements(page).count("img") == shown > 0
    assert page.count("data:image/jpeg;base64,") == shown


def test_confusion_matrices_add_up_to_the_clean_images(page: str, complete: Artifact) -> None:
    _, before, after, _ = Elements(page).charts
    for chart, key in ((before, "accuracy_before"), (after, "accuracy_after")):
        rows = chart["layer"][0].get("data", chart.get("data"))["values"]
        assert sum(row["images"] for row in rows) == 100
        right = sum(row["images"] for row in rows if row["right"])
        assert right == complete.report["clean_images"][key]["percent"]


def test_pictures_of_the_charts_lie_beside_the_card(complete: Artifact) -> None:
    text = (complete.folder / "README.md").read_text(encoding="utf-8")
    plots = sorted(path.name for path in (complete.folder / "plots").iterdir())
    assert plots == ["scores.png"]  # μ was given: there is no curve
    assert re.findall(r"!\[[^\]]+\]\((.*?)\)", text) == ["plots/scores.png"]
    with Image.open(complete.folder / "plots" / "scores.png") as picture:
        assert picture.width > 1000
        assert len(set(picture.convert("RGB").resize((200, 100)).get_flattened_data())) > 20


@pytest.mark.parametrize("curve", [True, False])
def test_hostile_names_are_text_everywhere(curve: bool) -> None:
    names = [HOSTILE, "b", "<b>ok"]
    report = a_report(warnings=[HOSTILE], stays={HOSTILE: HOSTILE}, model={"reference": HOSTILE}, refused=[HOSTILE])
    report["diagnosis"]["threshold"]["reason"] = HOSTILE
    elements = Elements(report_page(some_evidence(HOSTILE, curve=curve), report, names, HOSTILE))
    harmless = a_report(refused=["x"], warnings=["x"], stays={"conv": "x"})
    plain = Elements(report_page(some_evidence(curve=curve), harmless, list("abc"), "x"))
    assert [tag for tag, _ in elements.elements] == [tag for tag, _ in plain.elements]
    assert not any(name.startswith("on") for _, attributes in elements.elements for name in attributes)
    scores, *_, timeline = elements.charts
    assert {row["layer"] for row in scores["layer"][0]["data"]["values"]} == {HOSTILE}
    assert "{{7*7}}" in json.dumps(elements.charts)
    assert timeline != scores


def test_two_classes_of_one_name_stay_two_rows() -> None:
    charts = Elements(report_page(some_evidence(), a_report(), ["cat", "cat", "dog"], "bshub")).charts
    matrix = next(chart for chart in charts if '"field": "answer"' in json.dumps(chart))
    order = next(layer["encoding"]["y"]["scale"]["domain"] for layer in matrix["layer"] if "y" in layer["encoding"])
    assert order == ["cat (0)", "cat (1)", "dog"]


def test_a_thousand_classes_become_a_list_of_mistakes() -> None:
    evidence = some_evidence(classes=1000)
    before = [(label + 1) % 1000 if index < 30 else label for index, label in enumerate(evidence.labels)]
    names = [f"name {index}" for index in range(1000)]
    text = report_page(replace(evidence, before=before, after=evidence.labels), a_report(), names, "bshub")
    assert not any('"field": "answer"' in json.dumps(chart) for chart in Elements(text).charts)
    assert "<td>name 3</td><td>name 4</td>" in text
    assert len(text) < 1.5e6


def test_a_run_that_flagged_nothing_has_a_page(tmp_path: Path) -> None:
    layer = Layer("conv", [0, 1], [0.0, 0.0], ["kept", "kept"], {"spectral": [1.0, 1.0]})
    evidence = replace(some_evidence(), layers=[layer], threshold=Threshold(MU_NOTHING, "nothing is pruned"))
    report = a_report(counts=dict.fromkeys(("flagged", "removed", "silenced", "followers"), 0), repaired=False)
    text = report_page(evidence, report, ["a", "b", "c"], "bshub")
    assert "None of 6 filters was flagged" in text
    assert "1000000" not in text.split("<main>")[1].split("application/json")[1]
    assert [plot.path for plot in write_plots(tmp_path, evidence, report)] == ["plots/scores.png"]


def test_a_network_of_many_filters_is_drawn_with_few_points_and_every_flagged_one() -> None:
    layers = [
        Layer(
            f"layer{n}", list(range(500)), [index / 250 - 1 for index in range(500)],
            ["removed" if index == 499 else "kept" for index in range(500)], {},
        )
        for n in range(200)
    ]  # fmt: skip
    text = report_page(replace(some_evidence(), layers=layers), a_report(), ["a", "b", "c"], "bshub")
    rows = [row for layer in Elements(text).charts[0]["layer"] for row in layer["data"]["values"] if "fate" in row]
    drawn = {(row["layer"], row["filter"]): row["fate"] for row in rows}
    assert Counter(drawn.values())["removed"] == 200
    assert len(drawn) < 4000
    assert {filter for layer, filter in drawn if layer == "layer7"} >= {498, 499}


class Bright(nn.Module):
    """One filter that sees red, one that sees blue, in a network that answers by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Linear(2, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]).view(2, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def test_the_images_shown_are_those_the_filter_answers_to_most_at_the_right_place() -> None:
    images = torch.zeros(6, 3, 8, 8)
    images[4, 2, 1, 6] = 2.0  # blue in the upper right
    images[2, 2, 7, 0] = 1.0  # less, in the lower left
    model = Bright().eval()
    result = bshub.sanitize(model, [(images, torch.tensor([0, 1, 0, 1, 0, 1]))], Settings(mu=0.5, finetune_epochs=0))
    plan = replace(result.plan, removed={"conv": [1]}, silenced={}, followers={})
    preprocessing = make_preprocessing({"input_size": [3, 8, 8], "mean": [0.0] * 3, "std": [1.0] * 3}, "a test")
    before = snapshot(model)
    evidence = gather(
        model, result.model, result.diagnosis.pairing, result.diagnosis.scores, result.diagnosis.threshold, plan,
        result.clean, preprocessing, ["even", "odd"],
    )  # fmt: skip
    assert same(before, snapshot(model))
    (excited,) = evidence.excited
    first, second = excited.images[:2]
    assert (excited.layer, excited.filter, first.label) == ("conv", 1, "even")
    assert (first.left, first.top) == (6.5 / 8, 1.5 / 8)
    assert (second.left, second.top) == (0.5 / 8, 7.5 / 8)


def test_the_evidence_is_the_plan_and_the_answers(trained: nn.Module) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    images, labels = coloured_images(24)
    result = bshub.sanitize(model, [(images, labels)], Settings(mu=1.0, finetune_epochs=0))
    preprocessing = make_preprocessing({"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}, "a test")
    clean = result.clean
    assert isinstance(clean, CleanImages)
    evidence = gather(
        model, result.model, result.diagnosis.pairing, result.diagnosis.scores, result.diagnosis.threshold,
        result.plan, clean, preprocessing, list("abcd"), batch_size=5, pictures=False,
    )  # fmt: skip
    with torch.no_grad():
        assert evidence.before == model(images).argmax(1).tolist()
        assert evidence.after == result.model(images).argmax(1).tolist()
    assert evidence.excited == []
    assert evidence.labels == labels.tolist()
    fates = Counter(fate for layer in evidence.layers for fate in layer.fates)
    counts = result.report["counts"]
    assert (fates["removed"], fates["silenced"]) == (counts["removed"], counts["silenced"])
    assert sum(fates.values()) == result.diagnosis.pairing.filters


def test_no_report_and_no_thumbnails_leave_them_out(tmp_path: Path) -> None:
    common = [DEMO / "model", *BY_WEIGHTS, "--json"]
    result = bshub_command("sanitize", *common, "--no-thumbnails", "-o", tmp_path / "plain")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["page"] == {"clean_images_shown": 0}
    assert "data:image" not in (tmp_path / "plain" / "report.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_drawn_does_not_cost_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path, *rest: object) -> None:
        (folder / "plots").mkdir()
        raise ValueError("no such font")

    monkeypatch.setattr("bshub.release.report.write_plots", broken)
    result = bshub_command(
        "sanitize", DEMO / "model", "--clean-dir", DEMO / "clean",
        "--score", "lipschitz", "--mu", 2.5, "--finetune-epochs", 0, "--no-onnx",
        "--json", "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "report.html could not be drawn: no such font" in json.loads(result.stdout)["warnings"]
    assert not {"plots", "report.html"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert (
        "report.html" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("## How to make it")[1]
    )


def test_what_was_lost_stands_beside_the_accuracy_where_it_was_counted() -> None:
    evaluation = {"before": {"accuracy": RATE}, "after": {"accuracy": RATE}}
    lost = {"points": 1.4, "low": -0.1, "high": 2.9, "lost": 40, "gained": 26, "n": 1000}
    told = report_page(
        some_evidence(), a_report(evaluation={**evaluation, "accuracy_lost": lost}), list("abc"), "bshub"
    )
    assert "lost: -0.1 to 2.9 points" in told
    assert "lost:" not in report_page(some_evidence(), a_report(evaluation=evaluation), list("abc"), "bshub")


def test_a_hardened_network_is_called_neither_repaired_nor_unchanged() -> None:
    counts = dict.fromkeys(("flagged", "removed", "silenced", "followers"), 0)
    hardening = {"share": 0.7, "agreement": 0.9624, "passes": 6}
    for done in (True, False):
        report = a_report(counts=counts, repaired=done, repair_passes=6, hardening=hardening)
        text = report_page(some_evidence(), report, ["a", "b", "c"], "bshub")
        assert ("The network was hardened against faint waves, and 96 %" in text) == done
        assert ("The hardening (distil) went 6 times over" in text) == done
        assert ("The network is unchanged." in text) != done and "repaired" not in text


def test_a_network_that_was_only_repaired_is_not_called_unchanged() -> None:
    counts = dict.fromkeys(("flagged", "removed", "silenced", "followers"), 0)
    report = a_report(counts=counts, repaired=True, repair_passes=17)
    text = report_page(some_evidence(), report, ["a", "b", "c"], "bshub")
    assert "The network was repaired." in text and "unchanged" not in text and "went 17 times over" in text
