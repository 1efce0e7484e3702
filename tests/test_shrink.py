"""``--shrink``: useless filters leave as whole groups, within the share and the budget, apart from suspicious ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEMO, Artifact, bshub_command
from little_nets import Dense, Mixed, coloured_images, same, snapshot, train
from nets import Gate, Net, assert_equals_masked, conv_bn, head, randomize_batch_norm, residual_net, vgg_like
from torch import nn
from torch.nn import functional as F

import bshub
from bshub.commands import Inputs, sanitize_to_folder
from bshub.errors import UsageError
from bshub.evaluation.metrics import clean_accuracy
from bshub.pipeline import SanitizeResult, sanitize, scan
from bshub.scoring.plan import make_plan
from bshub.scoring.shrink import STEPS, choose_share
from bshub.scoring.statistics import measure
from bshub.scoring.usefulness import MOST_OF_A_LAYER, STEP, spare_order, taken, usefulness
from bshub.settings import Settings
from bshub.surgery.remove import remove, silence
from bshub.writing import Wishes

QUICK: dict[str, Any] = {"mu": 1.5, "finetune_epochs": 0, "device": "cpu"}


def batches(n: int = 24, size: int = 8) -> list:
    images, labels = coloured_images(n, seed=77)
    return list(zip(images.split(size), labels.split(size), strict=True))


def shrunk(model: nn.Module, shrink: float, **more: Any) -> SanitizeResult:
    return sanitize(model, batches(), Settings(**{**QUICK, "shrink": shrink, **more}))


def gated() -> nn.Sequential:
    return nn.Sequential(conv_bn(3, 12), conv_bn(12, 12, groups=12), Gate(12, 4), conv_bn(12, 10, 1), head(10))


NETS = {
    "residual": residual_net,
    "straight": vgg_like,
    "dense": lambda: nn.Sequential(Dense()),
    "depthwise": lambda: nn.Sequential(Mixed()),
    "gated": gated,
}


def prepared(kind: str, suspicious: float = 0.1) -> tuple[Net, list]:
    torch.manual_seed(3)
    net = Net(NETS[kind]())
    statistics = measure(net.model, net.pairing, [(net.images, torch.arange(4) % 3)], taylor=True)
    flagged = {name: index.tolist() for name, index in net.flags(suspicious, seed=2).items()}
    return net, [flagged, spare_order(net.flow, net.pairing, statistics, flagged)]


def arrays(filters: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(index, np.int64) for name, index in filters.items()}


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("kind", NETS)
def test_only_whole_free_groups_leave_and_the_small_network_equals_the_masked_one(kind: str, share: float) -> None:
    net, (flagged, order) = prepared(kind)
    assert order
    spare = taken(order, share * net.pairing.filters)
    removal = remove(net.model, net.flow, net.pairing, arrays(flagged), net.images, spare)
    plan = removal.plan
    assert not removal.refused
    assert_equals_masked(net, removal)
    assert removal.proof.holds
    assert removal.proof.error <= 1e-5
    assert plan.spare == {name: index.tolist() for name, index in spare.items()}  # nothing is merely silenced
    assert sum(map(len, plan.spare.values())) <= share * net.pairing.filters
    assert plan.flagged == {name: index for name, index in flagged.items() if index}
    pairs = {pair.name: pair for pair in net.pairing.pairs}
    for name, index in plan.spare.items():
        assert not set(index) & set(plan.flagged.get(name, ()))
        assert not set(index) & set(plan.silenced.get(name, ()))
        weight = removal.model.get_submodule(name).weight
        gone = len(index) + len(plan.removed.get(name, ())) + len(plan.followers.get(name, ()))
        assert weight.shape[0] == pairs[name].out_channels - gone
        assert len(index) + len(flagged[name]) <= max(
            MOST_OF_A_LAYER * pairs[name].out_channels, len(flagged[name])
        )  # no layer collapses


@pytest.mark.parametrize("kind", NETS)
def test_every_spare_filter_makes_the_network_smaller(kind: str) -> None:
    net, (flagged, order) = prepared(kind)
    sizes = []
    for count in range(min(len(order), 4) + 1):
        spare = taken(order[:count], net.pairing.filters)
        small = remove(net.model, net.flow, net.pairing, arrays(flagged), net.images, spare).model
        sizes.append(sum(parameter.numel() for parameter in small.parameters()))
    assert sizes == sorted(set(sizes), reverse=True)


def test_residual_channels_leave_with_all_their_writers() -> None:
    net, (_, order) = prepared("residual", 0.0)
    writers = {len(group) for group in order}
    assert writers == {1, 3}  # inner filters; the stem and both blocks write one sum
    shared = next(group for group in order if len(group) == 3)
    assert len({index for _, index in shared}) == 1
    part = make_plan(net.flow, net.pairing, {}, spare={name: np.array([index]) for name, index in shared[:2]})
    assert (part.spare, part.kept, part.zeroed) == ({}, {}, {})  # two of three: none of them leaves, none is silenced


def test_a_suspicious_filter_leaves_where_the_rest_of_its_group_is_spare() -> None:
    net, (_, order) = prepared("residual", 0.0)
    (name, index), *rest = next(group for group in order if len(group) == 3)
    alone = make_plan(net.flow, net.pairing, {name: np.array([index])})
    assert alone.silenced == {name: [index]}
    plan = make_plan(net.flow, net.pairing, {name: np.array([index])}, spare={n: np.array([i]) for n, i in rest})
    assert (plan.removed, plan.silenced) == ({name: [index]}, {})
    assert plan.spare == {n: [i] for n, i in rest}


def test_what_the_proof_forbids_stays_alive() -> None:
    net, (_, order) = prepared("straight", 0.0)
    ((name, index),) = order[0]
    (pair,) = (pair for pair in net.pairing.pairs if pair.name == name)
    group = frozenset({int(net.flow.groups[pair.slots[index]])})
    plan = make_plan(net.flow, net.pairing, {}, group, {name: np.array([index])})
    assert (plan.spare, plan.zeroed, plan.kept) == ({}, {}, {})


def test_usefulness_is_what_the_loss_loses_to_first_order() -> None:
    torch.manual_seed(0)
    net = Net(vgg_like())
    labels = torch.arange(4) % 3
    found = measure(net.model, net.pairing, [(net.images[:3], labels[:3]), (net.images[3:], labels[3:])], taylor=True)
    for pair in net.pairing.pairs:
        norm = net.model.get_submodule(pair.readers[0].norm.weight.rpartition(".")[0])
        kept: list[torch.Tensor] = []
        handle = norm.register_forward_hook(lambda m, a, y, kept=kept: (y.retain_grad(), kept.append(y), y + 0)[2])
        F.cross_entropy(net.model(net.images), labels, reduction="sum").backward()
        handle.remove()
        y = kept[0]
        by_hand = (y.detach() * y.grad).sum((2, 3)).square().mean(0)  # (n, out) → (out)
        assert torch.allclose(found[pair.name].taylor, by_hand, rtol=1e-3, atol=1e-8)
        assert np.linalg.norm(usefulness(found[pair.name])) == pytest.approx(1)
    plain = measure(net.model, net.pairing, [(net.images, labels)])
    assert all(statistics.taylor is None for statistics in plain.values())
    with pytest.raises(UsageError, match="needs clean images"):
        usefulness(plain[net.pairing.pairs[0].name])


def test_usefulness_does_not_depend_on_batches_and_changes_no_other_statistic() -> None:
    net = Net(residual_net())
    labels = torch.arange(4) % 3
    runs = [
        measure(net.model, net.pairing, zip(net.images.split(size), labels.split(size), strict=True), taylor=taylor)
        for size, taylor in ((4, True), (1, True), (4, False))
    ]
    for name, first in runs[0].items():
        assert torch.allclose(first.taylor, runs[1][name].taylor, rtol=1e-3, atol=1e-9)
        for statistic in ("spectral", "saliency", "activation", "correlation", "bn_shift"):
            assert torch.equal(getattr(first, statistic), getattr(runs[2][name], statistic))


def test_a_module_that_runs_twice_on_other_numbers_of_images_is_measured() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = conv_bn(3, 6), head(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tiles = torch.cat([x[..., :8], x[..., 8:]])
            return self.head(self.body(x)) + self.head(self.body(tiles)).unflatten(0, (2, -1)).sum(0)

    net = Net(Twice())
    found = measure(net.model, net.pairing, [(net.images, torch.arange(4) % 3)], taylor=True)
    assert all(bool((statistics.taylor > 0).all()) for statistics in found.values())


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
        "sanitize", DEMO / "model", "--clean-dir", DEMO / "clean", "--shrink", 0.2, "--mu", 2.25,
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
        settings = Settings(shrink=0.15, mu=2.25, finetune_epochs=0)
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
    command = ("sanitize", DEMO / "model", "--clean-dir", DEMO / "clean", "--mu", 2.25, "--shrink", 0.1, "--dry-run")
    report = json.loads(bshub_command(*command, "--json").stdout)
    spare = report["diagnosis"]["counts"]["spare"]
    assert spare == sum(map(len, report["shrink"]["filters"].values())) > 0
    assert list(tmp_path.iterdir()) == []
    told = " ".join(bshub_command(*command, "--quiet").stdout.split())
    assert f"{report['diagnosis']['counts']['flagged']} of 1864 filters" in told
    assert f"shrink: {spare} spare filters would be removed" in told


def test_a_trained_net_answers_better_without_its_useless_than_without_its_useful_filters() -> None:
    torch.manual_seed(1)
    model = train(vgg_like_16())
    found = scan(model, batches(48), Settings(**{**QUICK, "mu": 50.0}, shrink=0.01))
    statistics = measure(model, found.pairing, batches(48), taylor=True)
    order = spare_order(found.flow, found.pairing, statistics, {})
    images, labels = coloured_images(48, seed=9)
    losses = []
    for way in (order, order[::-1]):
        plan = make_plan(found.flow, found.pairing, {}, spare=taken(way, 0.4 * found.pairing.filters))
        with torch.no_grad():
            losses.append(float(F.cross_entropy(silence(model, plan)(images), labels)))
    assert losses[0] < losses[1]


def vgg_like_16() -> nn.Module:
    return nn.Sequential(conv_bn(3, 12), conv_bn(12, 16), conv_bn(16, 12), head(12, 3))
