"""``sanitize`` and ``scan`` on a model and batches in memory."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from little_nets import Dense, Mixed, WithoutNorm, coloured_images, same, snapshot
from nets import randomize_batch_norm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bshub.clean import KEPT_IMAGES, CleanImages
from bshub.device import pick_precision
from bshub.errors import BshubError, InconclusiveError, UsageError
from bshub.pipeline import sanitize, scan
from bshub.scoring.suspiciousness import SCORES
from bshub.settings import Settings

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"mu": 1.0, "finetune_epochs": 1, "device": "cpu"}


def batches(n: int = 24, size: int = 8) -> list:
    images, labels = coloured_images(n, seed=77)
    return list(zip(images.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("score", SCORES)
def test_the_callers_model_is_never_changed(trained: nn.Module, score: str) -> None:
    model = copy.deepcopy(trained).train()
    model.bn2.eval()
    model.fc.bias.requires_grad_(False)
    before = snapshot(model)
    result = sanitize(model, batches(), Settings(score=score, **QUICK))
    assert same(before, snapshot(model))
    assert result.report["counts"]["flagged"] > 0
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in result.model.parameters()}
    assert not shared


def test_the_result_is_smaller_on_the_cpu_and_ready_to_use(trained: nn.Module) -> None:
    result = sanitize(trained, batches(), Settings(**QUICK))
    assert result.plan.counts()["removed"] > 0
    parameters = result.report["parameters"]
    assert parameters["after"] == sum(p.numel() for p in result.model.parameters()) < parameters["before"]
    assert result.report["macs"]["after"] < result.report["macs"]["before"]
    assert not any(module.training for module in result.model.modules())
    assert {p.device for p in result.model.parameters()} == {CPU}
    assert result.report["proof"]["holds"]
    assert result.report["repaired"] and result.report["repair"] == "accuracy was brought back"


def facts(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key != "seconds"}


@pytest.mark.parametrize("score", ["lipschitz", "bss"])
def test_the_same_seed_gives_the_same_plan_and_weights_bit_for_bit(trained: nn.Module, score: str) -> None:
    results = []
    for noise in (0, 1):
        torch.manual_seed(noise)  # the caller's generator has no say
        results.append(sanitize(trained, batches(), Settings(score=score, seed=5, **QUICK)))
    first, second = results
    assert first.plan == second.plan
    assert facts(first.report) == facts(second.report)
    assert all(torch.equal(first.diagnosis.scores[k], second.diagnosis.scores[k]) for k in first.diagnosis.scores)
    assert same(snapshot(first.model), snapshot(second.model))


def test_the_plan_does_not_depend_on_how_the_images_are_batched(trained: nn.Module) -> None:
    plans = [sanitize(trained, batches(size=size), Settings(score="bss", **QUICK)).plan for size in (24, 8, 5)]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("mu", [1.0, "auto", 50.0])
def test_the_report_is_json_without_nan(trained: nn.Module, mu: Any) -> None:
    report = sanitize(trained, batches(), Settings(**{**QUICK, "mu": mu})).report
    assert json.loads(json.dumps(report, allow_nan=False))["settings"]["mu"] == mu


def test_when_nothing_is_flagged_the_result_is_an_unchanged_copy(trained: nn.Module) -> None:
    trained = copy.deepcopy(trained).requires_grad_(True)
    result = sanitize(trained, batches(), Settings(**{**QUICK, "mu": 50.0}))
    assert set(result.plan.counts().values()) == {0}
    assert not result.report["repaired"] and result.report["repair"] == "nothing was found and nothing removed"
    assert result.model is not trained
    assert same({**snapshot(trained)}, snapshot(result.model))
    assert result.report["parameters"]["before"] == result.report["parameters"]["after"]


def test_mu_auto_stays_within_the_budget(trained: nn.Module) -> None:
    result = sanitize(trained, batches(), Settings(mu="auto", budget=5.0, finetune_epochs=0, device="cpu"))
    clean = result.report["clean_images"]
    assert clean["accuracy_after"]["percent"] >= clean["accuracy_before"]["percent"] - 5.0
    for _, _, accuracy in result.diagnosis.threshold.curve:
        assert 0 <= accuracy <= 1


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("run", [sanitize, scan])
def test_too_few_images_are_inconclusive(trained: nn.Module, run: Any, n: int) -> None:
    with pytest.raises(InconclusiveError) as caught:
        run(trained, batches(n) if n else [])
    assert caught.value.exit_code == 3


def test_four_images_are_enough(trained: nn.Module) -> None:
    assert sanitize(trained, batches(4, 1), Settings(score="bss", **QUICK)).report["clean_images"]["n"] == 4


@pytest.mark.parametrize("run", [sanitize, scan])
def test_a_model_without_batch_norm_is_inconclusive(run: Any) -> None:
    with pytest.raises(InconclusiveError) as caught:
        run(WithoutNorm(), batches())
    assert caught.value.exit_code == 3


def test_a_data_loader_works(trained: nn.Module) -> None:
    images, labels = coloured_images(24, seed=77)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    for score in ("lipschitz", "bss"):
        settings = Settings(score=score, **QUICK)
        assert sanitize(trained, loader, settings).plan == sanitize(trained, batches(), settings).plan


def test_a_generator_is_read_once_and_to_its_end(trained: nn.Module) -> None:
    seen = []

    def loader():
        for batch in batches():
            seen.append(len(batch[1]))
            yield batch

    assert sanitize(trained, loader(), Settings(score="bss", **QUICK)).report["clean_images"]["n"] == 24
    assert seen == [8, 8, 8]


@pytest.mark.parametrize(
    "loader",
    [
        [torch.rand(8, 3, 16, 16)], [(torch.rand(8, 3, 16, 16), torch.zeros(7))], [(torch.rand(3, 16, 16), 1)],
        [(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.zeros(8))], [("x", "y")],
        [(torch.full((8, 3, 16, 16), float("nan")), torch.zeros(8))],
        [(torch.full((8, 3, 16, 16), float("inf")), torch.zeros(8))],
    ],
    ids=["images alone", "count", "one image", "uint8", "text", "nan", "inf"],
)  # fmt: skip
def test_a_loader_of_something_else_is_refused(trained: nn.Module, loader: list) -> None:
    with pytest.raises(UsageError):
        sanitize(trained, loader)


@pytest.mark.parametrize("what", ["sizes", "labels", "none"])
def test_so_is_one_whose_batches_do_not_fit(trained: nn.Module, what: str) -> None:
    images, labels = coloured_images(8)
    second = {"sizes": (torch.rand(8, 3, 20, 20), labels), "labels": (images, labels + 90), "none": None}[what]
    loader = [(images, labels), second, (images, labels)]
    with pytest.raises(UsageError):
        sanitize(trained, loader, Settings(score="bss", **QUICK))


@pytest.mark.parametrize("model", [Mixed(), Dense()], ids=["mixed", "dense"])
@pytest.mark.parametrize("with_images", [False, True])
def test_scan_touches_nothing_and_needs_no_images(model: nn.Module, with_images: bool) -> None:
    randomize_batch_norm(model).train()
    before = snapshot(model)
    diagnosis = scan(model, batches() if with_images else None, Settings(mu=1.0), input_size=(3, 16, 16))
    assert same(before, snapshot(model))
    assert diagnosis.plan.counts()["flagged"] > 0
    assert (diagnosis.clean_accuracy is None) != with_images
    json.dumps(diagnosis.as_dict(), allow_nan=False)


def test_scan_without_images_says_that_it_takes_another_score(trained: nn.Module) -> None:
    diagnosis = scan(trained, None, Settings(score="bss"), input_size=(3, 16, 16))
    assert diagnosis.score == "lipschitz"
    assert "'bss'" in diagnosis.warnings[0]


def test_scan_and_sanitize_see_the_same(trained: nn.Module) -> None:
    settings = Settings(**QUICK)
    found, done = scan(trained, batches(), settings), sanitize(trained, batches(), settings)
    assert found.plan == done.plan
    top = found.most_suspicious(5)
    assert [score for _, _, score in top] == sorted((score for _, _, score in top), reverse=True)
    assert all(index in found.plan.flagged[name] for name, index, _ in top)


def test_foreign_images_are_warned_about(trained: nn.Module) -> None:
    images, labels = coloured_images(24)
    diagnosis = scan(trained, [(images, (labels + 1) % 3)], Settings(mu=3.0))
    assert any("clean images" in warning for warning in diagnosis.warnings)
    assert not scan(trained, [(images, labels)], Settings(score="lipschitz", mu=3.0)).warnings


def test_an_unknown_score_and_a_foreign_device_are_refused(trained: nn.Module) -> None:
    for bad in ({"score": "nope"}, {"device": "cuda:99"}, {"device": "toaster"}):
        with pytest.raises(UsageError):
            sanitize(trained, batches(), Settings(**bad))


@pytest.mark.parametrize("streamed", [True, False])
def test_a_bounded_part_of_many_images_is_kept(streamed: bool) -> None:
    made = []

    def loader():
        for start in range(0, 3000, 100):
            made.append(start)
            yield torch.full((100, 1, 2, 2), float(start)), torch.arange(start, start + 100)

    clean = CleanImages(loader(), CPU)
    if streamed:
        assert sum(len(labels) for _, labels in clean.stream()) == 3000
    clean.drain()
    assert clean.count == (3000 if streamed else 1100)
    assert clean.labels.tolist() == list(range(KEPT_IMAGES))
    assert clean.images.shape == (KEPT_IMAGES, 1, 2, 2)
    assert sum(len(labels) for _, labels in clean.batches(7)) == KEPT_IMAGES
    assert clean.input_size == (1, 2, 2)


def test_two_surgeries_compose_to_one_set_of_original_indices(trained: nn.Module) -> None:
    """Without repair, what is left are the original's own numbers at the indices that the recipe kept."""
    from bshub.intake.recipe import Recipe

    recipe, model = Recipe(), trained
    for mu in (1.5, 1.0):
        result = sanitize(model, batches(), Settings(mu=mu, finetune_epochs=0, device="cpu"))
        assert result.plan.counts()["removed"] > 0
        recipe, model = recipe.then(result.removal.attributes, result.plan.kept), result.model
    recipe = Recipe.from_json(json.loads(json.dumps(recipe.as_json())))
    for name, tensor in model.state_dict().items():
        wanted = trained.state_dict()[name]
        for axis, index in recipe.kept.get(name, {}).items():
            wanted = wanted.index_select(axis, torch.tensor(index))
        assert tensor.shape == wanted.shape, name
        assert torch.equal(tensor, torch.where(tensor == 0, 0, wanted)), name  # zeros: silenced in place


def test_a_repair_that_diverges_is_not_a_result(trained: nn.Module) -> None:
    settings = Settings(mu=1.0, repair="finetune", finetune_epochs=30, finetune_lr=10.0, device="cpu")
    try:
        result = sanitize(trained, batches(), settings)
    except BshubError:
        return
    assert all(bool(torch.isfinite(tensor).all()) for tensor in result.model.state_dict().values())


def test_nan_weights_are_inconclusive(trained: nn.Module) -> None:
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        broken.get_parameter("conv2.weight")[0] = float("nan")
    with pytest.raises(InconclusiveError):
        scan(broken, batches(), Settings(mu=1.0))


def test_where_the_labels_are_not_the_models_its_own_answers_choose_mu(trained: nn.Module) -> None:
    images, labels = coloured_images(24, seed=77)
    ours = scan(trained, [(images, (labels + 1) % 3)])
    with torch.no_grad():
        answers = trained.eval()(images).argmax(1)
    theirs = scan(trained, [(images, answers)])
    assert "agreement" in ours.threshold.reason and "agreement" not in theirs.threshold.reason
    assert (ours.threshold.mu, ours.plan.flagged) == (theirs.threshold.mu, theirs.plan.flagged)


def test_a_repair_that_makes_things_worse_is_undone_and_said(trained: nn.Module) -> None:
    settings = Settings(mu=1.0, repair="finetune", finetune_epochs=30, finetune_lr=10.0)
    result = sanitize(trained, batches(), settings)
    assert not result.report["repaired"] and result.report["repair"] == "it made the model worse"
    assert any("undone" in warning for warning in result.report["warnings"])
    untouched = sanitize(trained, batches(), Settings(mu=1.0, finetune_epochs=0))
    assert untouched.report["repair"] == "none was asked for"
    for name, tensor in untouched.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name])


class Depthwise(nn.Module):
    """A block as MobileNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)


@pytest.mark.parametrize("units", [True, False])
def test_auto_takes_bf16_where_the_processor_has_it_and_convolutions_are_dense(
    trained: nn.Module, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bshub.device.has_bf16", lambda device: units)
    assert pick_precision("auto", trained, CPU) == ("bf16" if units else "fp32")
    assert pick_precision("auto", Depthwise(), CPU) == "fp32"
    assert pick_precision("auto", nn.Conv2d(1, 4, 3), CPU) == ("bf16" if units else "fp32")  # gray images
    for told in ("fp32", "bf16"):
        assert pick_precision(told, trained, CPU) == pick_precision(told, Depthwise(), CPU) == told
    settings = sanitize(trained, batches(), Settings(score="lipschitz", **QUICK)).report["settings"]
    assert settings["precision"] == ("bf16" if units else "fp32")  # what was used, not what was told


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bf16_without_units_for_it_is_warned_about(
    trained: nn.Module, precision: str, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bshub.mending.has_bf16", lambda device: units)
    result = sanitize(trained, batches(), Settings(score="lipschitz", precision=precision, **QUICK))
    assert result.report["repair_passes"]
    warned = any("bf16" in warning for warning in result.report["warnings"])
    assert warned == (precision == "bf16" and not units)
