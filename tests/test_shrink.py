"""``--shrink``: useless filters leave within the share and the budget, apart from suspicious ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, Artifact, bshub_command
from little_nets import coloured_images, same, snapshot
from nets import randomize_batch_norm
from torch import nn

import bshub
from bshub.commands import Inputs, sanitize_to_folder
from bshub.errors import UsageError
from bshub.evaluation.metrics import clean_accuracy
from bshub.pipeline import SanitizeResult, sanitize, scan
from bshub.scoring.shrink import STEPS, choose_share
from bshub.scoring.usefulness import STEP
from bshub.settings import Settings
from bshub.surgery.remove import silence
from bshub.writing import Wishes

QUICK: dict[str, Any] = {"mu": 1.5, "finetune_epochs": 0, "device": "cpu"}


def batches(n: int = 24, size: int = 8) -> list:
    images, labels = coloured_images(n, seed=77)
    return list(zip(images.split(size), labels.split(size), strict=True))


def shrunk(model: nn.Module, shrink: float, **more: Any) -> SanitizeResult:
    return sanitize(model, batches(), Settings(**{**QUICK, "shrink": shrink, **more}))


@pytest.mark.parametrize("budget", [0.0, 10.0, 50.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_share_and_budget_hold_on_the_clean_images(trained: nn.Module, share: float, budget: float) -> None:
    before = snapshot(trained)
    result = shrunk(trained, share, budget=budget, mu=50.0)
    shrink, spare = result.report["shrink"], result.plan.spare
    filters = result.report["diagnosis"]["filters"]
    assert same(before, snapshot(trained))
    assert shrink["asked"] == share
    assert shrink["reached"] == sum(map(len, spare.values())) / filters <= share
    assert shrink["filters"] == spare
    assert result.report["counts"]["spare"] == sum(map(len, spare.values()))
    accuracy = clean_accuracy(result.model, batches()).value
    assert accuracy >= shrink["floor"]
    assert accuracy >= result.report["clean_images"]["accuracy_before"]["percent"] / 100 - budget / 100 - 1e-9
    (chosen,) = {value for _, count, value in shrink["curve"] if count == result.report["counts"]["spare"]}
    assert chosen == pytest.approx(accuracy)
    assert len(shrink["curve"]) <= 7
    json.dumps(shrink, allow_nan=False)


def test_a_wide_budget_gives_what_was_asked_for(trained: nn.Module) -> None:
    result = shrunk(trained, 0.4, budget=100.0)
    filters = result.report["diagnosis"]["filters"]
    assert result.report["counts"]["spare"] > 0.4 * filters - 3  # a group of the sum has two writers
    assert result.report["macs"]["after"] < 0.8 * result.report["macs"]["before"]
    assert "all that was asked for" in result.report["shrink"]["reason"]


def test_no_shrink_changes_nothing_and_flagged_keeps_its_meaning(trained: nn.Module) -> None:
    plain, none = sanitize(trained, batches(), Settings(**QUICK)), shrunk(trained, 0.0)
    much = shrunk(trained, 0.5, budget=60.0)
    assert plain.plan == none.plan
    assert same(snapshot(plain.model), snapshot(none.model))
    assert set(plain.report["counts"]) == {"flagged", "removed", "silenced", "followers"}
    assert "shrink" not in none.report
    assert "shrink" not in none.report["diagnosis"]
    assert none.diagnosis.shrink is None
    assert much.plan.flagged == plain.plan.flagged == much.report["diagnosis"]["flagged"]
    assert much.report["diagnosis"]["threshold"] == plain.report["diagnosis"]["threshold"]
    assert much.plan.spare
    for name, index in much.plan.spare.items():
        assert not set(index) & set(much.plan.flagged.get(name, ()))
    assert much.diagnosis.most_suspicious(99) == plain.diagnosis.most_suspicious(99)


@pytest.mark.parametrize("score", ["lipschitz", "bss"])
def test_the_same_images_give_the_same_plan(trained: nn.Module, score: str) -> None:
    first, second = (shrunk(trained, 0.3, budget=20.0, score=score, finetune_epochs=1) for _ in range(2))
    assert first.plan == second.plan
    assert first.report["repaired"] == bool(first.plan.flagged or first.plan.spare)
    assert same(snapshot(first.model), snapshot(second.model))


def test_where_no_group_is_free_nothing_leaves_and_the_report_says_so() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x)).mean((2, 3))

    result = shrunk(randomize_batch_norm(Only()), 0.9, mu=50.0)
    assert result.report["counts"]["spare"] == result.report["shrink"]["reached"] == 0
    assert result.report["shrink"]["reason"].startswith("no group of useless filters can leave")


def test_a_network_of_foreign_images_is_held_to_its_own_answers(trained: nn.Module) -> None:
    images, labels = coloured_images(24, seed=5)
    wrong = [(images, (labels + 1) % 3)]
    result = sanitize(trained, wrong, Settings(**{**QUICK, "mu": 50.0}, shrink=0.5, budget=10.0))
    assert result.report["shrink"]["floor"] == pytest.approx(0.9)
    with torch.no_grad():
        assert (result.model(images).argmax(1) == trained(images).argmax(1)).double().mean() >= 0.9 - 1e-9


def test_without_images_nothing_is_called_useless(trained: nn.Module) -> None:
    found = scan(trained, None, Settings(shrink=0.5, device="cpu"), input_size=(3, 16, 16))
    assert not found.plan.spare
    assert found.shrink is None
    assert any("--shrink does nothing" in warning for warning in found.warnings)


def test_a_scan_plans_what_sanitize_does(trained: nn.Module) -> None:
    settings = Settings(**{**QUICK, "budget": 20.0}, shrink=0.4)
    plan = scan(copy.deepcopy(trained), batches(), settings).plan
    assert plan == sanitize(trained, batches(), settings).plan


def curve(border: float) -> Any:
    """A network of 100 filters that bears the loss of a share of them."""

    def accuracy_at(share: float) -> tuple[dict[str, list[int]], float]:
        return {"a": list(range(int(100 * share)))}, 0.9 if share <= border else 0.2

    return accuracy_at


@pytest.mark.parametrize("border", [0.0, 0.01, 0.2, 0.3, 0.59, 0.6])
def test_the_border_is_found_in_a_few_steps(border: float) -> None:
    found = choose_share(curve(border), 0.6, 100, 0.9, 5.0)
    share = max(share for share, _, accuracy in found.curve if accuracy > 0.5)
    assert border - 0.6 / STEPS <= share <= border + 1e-9
    assert len(found.curve) <= 7
    assert [share for share, _, _ in found.curve] == sorted(share for share, _, _ in found.curve)
    assert ("nothing more is removed" in found.reason) == (not found.filters.get("a"))


def test_suspicious_filters_may_use_the_budget_up() -> None:
    found = choose_share(lambda share: ({"a": [0]} if share else {}, 0.5), 0.3, 10, 0.9, 5.0)
    assert found.filters == {}
    assert found.reason.startswith("the suspicious filters alone cost more than 5 points")


@pytest.mark.parametrize("value", [-0.1, 0.91, 1, 30, float("nan"), True, "0.3", None])
def test_what_is_no_share_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="shrink"):
        Settings(shrink=value)


def test_the_command_refuses_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for options, said in ((("--shrink", 0.95), "0 to 0.9"), (("--shrink", 0.3, "--method", "clp"), "does not go with")):
        result = bshub_command("sanitize", "./nowhere", "--clean-dir", tmp_path, *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert said in result.stderr
    assert bshub_command("sanitize", "./nowhere", "--shrink", "much").exit_code == 2
    (tmp_path / "bshub.toml").write_text("shrink = 2\n")
    assert "bshub.toml: shrink is a share" in bshub_command("sanitize", "./nowhere").stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The demo with ``--shrink 0.2`` and a report page, after a pass of repair."""
    folder = tmp_path_factory.mktemp("shrunk") / "out"
    result = bshub_command(
        "sanitize", DEMO / "model", "--clean-dir", DEMO / "clean", "--shrink", 0.2,
        "--score", "lipschitz", "--mu", 2.25,
        "--finetune-epochs", 1, "--no-onnx", "--json", "-o", folder,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return Artifact(folder, result, json.loads(result.stdout), folder)


def test_the_demo_gets_smaller_and_its_artifact_loads_bit_for_bit(demo: Artifact) -> None:
    report = demo.report
    assert report["counts"]["spare"] > 100
    assert report["macs"]["after"] < 0.9 * report["macs"]["before"]
    assert report["proof"]["holds"]
    model = bshub.load(str(demo.folder)).module
    assert sum(parameter.numel() for parameter in model.parameters()) == report["parameters"]["after"]
    assert bshub_command("verify", demo.folder).exit_code == 0


def test_wide_layers_keep_a_width_that_runtimes_like(demo: Artifact) -> None:
    model = bshub.load(str(demo.folder)).module
    widths = {name: model.get_submodule(name).out_channels for name in demo.report["shrink"]["filters"]}
    assert len(widths) > 5
    assert {width % STEP for width in widths.values()} == {0}, widths


def test_an_artifact_of_both_kinds_rebuilds_from_one_recipe(tmp_path: Path) -> None:
    inputs = Inputs(str(DEMO / "model"), None, None, DEMO / "clean", None, None, None, False, None)
    made: list[SanitizeResult] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bshub.commands.sanitize", lambda *a, **k: made.append(sanitize(*a, **k)) or made[-1])
        settings = Settings(score="lipschitz", shrink=0.15, mu=2.25, finetune_epochs=0)
        sanitize_to_folder(inputs, settings, tmp_path / "out", wishes=Wishes(onnx=False, page=False))
    (result,) = made
    assert result.plan.spare
    assert result.plan.removed
    loaded = bshub.load(str(tmp_path / "out")).module
    assert same(snapshot(loaded.eval()) | {"flags": 0}, snapshot(result.model) | {"flags": 0})
    images = result.clean.images[:16].cpu()
    with torch.no_grad():
        assert torch.equal(loaded(images), result.model(images))
    masked = silence(bshub.load(str(DEMO / "model")).module.eval(), result.plan)
    with torch.no_grad():
        ours, theirs = loaded(images), masked(images)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


def test_card_and_page_keep_suspicious_and_spare_filters_apart(demo: Artifact) -> None:
    counts, shrink = demo.report["counts"], demo.report["shrink"]
    card = " ".join((demo.folder / "README.md").read_text(encoding="utf-8").split())
    assert f"{counts['flagged']:,} of them lie more than" in card
    assert f"{counts['spare']:,} such *spare* filters" in card
    assert shrink["reason"] in card
    assert "--shrink 0.2" in card
    page = " ".join((demo.folder / "report.html").read_text(encoding="utf-8").split("<script>")[0].split())
    assert f"{counts['flagged']:,} of 1,864 filters stood out" in page
    assert f"{counts['spare']:,} that were not suspicious, but of little use, left too" in page
    assert "Useless filters that left too" in page
    assert '<span class="spare">spare</span>' in page
    assert '"fate": "spare"' in page
    properties = json.loads((demo.folder / "bom.cdx.json").read_text(encoding="utf-8"))
    assert f'"{counts["spare"]}"' in json.dumps(properties)
    assert json.loads((demo.folder / "metrics.json").read_text(encoding="utf-8"))["counts"] == counts


def test_a_dry_run_tells_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = (
        "sanitize", DEMO / "model", "--clean-dir", DEMO / "clean", "--score", "lipschitz", "--mu", 2.25,
        "--shrink", 0.1, "--dry-run",
    )  # fmt: skip
    report = json.loads(bshub_command(*command, "--json").stdout)
    spare = report["diagnosis"]["counts"]["spare"]
    assert spare == sum(map(len, report["shrink"]["filters"].values())) > 0
    assert list(tmp_path.iterdir()) == []
    told = " ".join(bshub_command(*command, "--quiet").stdout.split())
    assert f"{report['diagnosis']['counts']['flagged']} of 1864 filters" in told
    assert f"shrink: {spare} spare filters would be removed" in told
