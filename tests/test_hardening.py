"""Hardening against faint waves: what is shown, how far it goes, when it is done, and what is said of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from little_nets import same, snapshot
from test_inversion import Planted, clean_images
from test_lesson import sizes_seen
from torch import Tensor, nn

from bshub import sanitize
from bshub.fleet.task import summary
from bshub.repair import finetune
from bshub.repair.finetune import Schedule, repair
from bshub.repair.hardening import AGREES, SHARES, harden
from bshub.repair.lesson import FAINT, STRONG, fresh_mixtures, waved
from bshub.settings import Settings
from bshub.stand_ins import StandIns

CLASSES = 4  # all of which the little network gives some image


def innocent() -> tuple[nn.Module, Tensor, Tensor]:
    """A network in which nothing is to be found, and images of each of its classes."""
    model = Planted(backdoor=False, classes=CLASSES)
    return model, *clean_images(model, count=48)


def fooled(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that are not answered with their label any more under waves."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        answers = [model(waved(images, generator)).argmax(1) for _ in range(8)]
    return float((torch.stack(answers) != labels).float().mean())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), height=st.integers(17, 30), width=st.integers(17, 30), scale=st.floats(0.1, 10))
def test_each_image_gets_one_sinusoid_of_its_own_no_stronger_than_told(
    seed: int, height: int, width: int, scale: float
) -> None:
    images = scale * torch.randn(6, 3, height, width, generator=torch.Generator().manual_seed(1))
    shown = waved(images, torch.Generator().manual_seed(seed))
    change = (shown - images).double() / float(images.std())
    spectrum = torch.fft.fft2(change).abs().square()
    whole = spectrum.sum((2, 3))
    seen = whole > 1e-3 * whole.amax(1, keepdim=True)
    for image in range(6):
        for colour in seen[image].nonzero().flatten().tolist():  # a wave and its mirror hold all of the energy
            assert float(spectrum[image, colour].flatten().topk(2).values.sum()) > 0.999 * float(whole[image, colour])
    gray = (change - change[:, :1]).abs().amax((1, 2, 3)) < 1e-4
    assert float(change[gray].abs().amax()) <= STRONG * 1.01 if bool(gray.any()) else True
    assert len({round(float(value), 5) for value in change.flatten(1).norm(dim=1)}) == 6
    assert torch.equal(shown, waved(images, torch.Generator().manual_seed(seed)))


def test_waves_are_of_all_strengths_and_directions_and_most_are_gray() -> None:
    images = torch.randn(600, 3, 17, 17, generator=torch.Generator().manual_seed(1))
    change = (waved(images, torch.Generator().manual_seed(2)) - images) / images.std()
    gray = (change - change[:, :1]).abs().amax((1, 2, 3)) < 1e-4
    assert 0.5 < float(gray.float().mean()) < 0.7
    spectrum = torch.fft.rfft2(change[gray][:, 0]).abs()
    waving = spectrum.flatten(1).argmax(1)
    assert len(waving.unique()) > 100  # of 9 · 17 that there are
    strengths = change[gray].abs().amax((1, 2, 3))
    assert float(strengths.min()) < 2 * FAINT and float(strengths.max()) > 0.9 * STRONG


def test_mixtures_for_a_comparison_are_the_same_for_the_same_seed_and_no_image_that_was_given() -> None:
    images, labels = torch.randn(10, 3, 16, 16), torch.arange(10)
    first, again, other = (list(fresh_mixtures(images, labels, 70, 32, seed)) for seed in (0, 0, 1))
    assert [len(batch) for batch, _ in first] == [32, 32]
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0]) and not torch.equal(first[0][0], first[1][0])
    assert all((mixture - images).abs().amax((1, 2, 3)).min() > 0.1 for batch, _ in first for mixture in batch)


def test_waves_come_beside_five_times_as_many_mixtures_and_at_most_three_batches_pass_at_once() -> None:
    model, images, labels = innocent()
    schedule = Schedule(epochs=1, lr=0.002, batch_size=8, seed=3)
    with sizes_seen(model) as seen:
        repair(model, copy.deepcopy(model), images, labels, {}, "distil", schedule, waves=True)
    assert seen[:3] == [24, 24, 8]  # of eight with waves, eight without, and forty mixtures


@pytest.mark.parametrize("waves", [True, False])
def test_a_step_in_parts_is_the_step_of_the_whole(monkeypatch: pytest.MonkeyPatch, waves: bool) -> None:
    model, images, labels = innocent()
    model, results = model.double(), []
    for at_once in (3, 100):
        monkeypatch.setattr(finetune, "AT_ONCE", at_once)
        taught = copy.deepcopy(model)
        loss = repair(
            taught, model, images.double(), labels, {}, "distil", Schedule(2, 0.02, 8, seed=3), waves=waves
        )  # fmt: skip
        results.append((torch.cat([p.detach().flatten() for p in taught.parameters()]), loss))
    assert not torch.equal(results[0][0], torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-6)  # teacher's answers are float32
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


def test_a_network_that_waves_fool_is_fooled_less_and_most_mixtures_are_answered_as_before() -> None:
    model = Planted(backdoor=True, classes=CLASSES)  # its checkerboard is the shortest of the waves
    _, images, labels = innocent()
    hardened, before = copy.deepcopy(model), snapshot(model)
    done = harden(hardened, images, labels, Schedule(10, 0.02, 16, seed=0), model)
    assert same(before, snapshot(model))
    assert done.share in SHARES and done.agreement >= AGREES
    assert fooled(hardened, images, labels) < 0.8 * fooled(model, images, labels)
    with torch.no_grad():
        mixtures = [batch for batch, _ in fresh_mixtures(images, labels, 512, 32, seed=77)]
        alike = [float((hardened(m).argmax(1) == model(m).argmax(1)).float().mean()) for m in mixtures]
    assert sum(alike) / len(alike) > AGREES - 0.03


def test_where_hardening_would_change_too_much_the_network_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bshub.repair.hardening.AGREES", 1.01)
    model, images, labels = innocent()
    hardened = copy.deepcopy(model)
    done = harden(hardened, images, labels, Schedule(10, 0.02, 16, seed=0), model)
    assert (done.share, done.agreement) == (0, 1) and same(snapshot(model), snapshot(hardened))


def test_a_network_in_which_nothing_is_found_is_hardened_and_the_report_says_so() -> None:
    model, images, labels = innocent()
    result = sanitize(model, [(images, labels)], Settings(harden=True))
    report = result.report
    assert not any(result.plan.counts().values()) and report["repaired"] and report["repair_passes"] == 12
    assert report["hardening"]["agreement"] >= AGREES and report["hardening"]["share"] in SHARES
    assert report["repair"].startswith("hardened against faint waves") and "hardening" in report["seconds"]
    assert not same(snapshot(model), snapshot(result.model))
    again = sanitize(model, [(images, labels)], Settings(harden=True))
    assert same(snapshot(result.model), snapshot(again.model)) and again.report["hardening"] == report["hardening"]


@pytest.mark.parametrize("told", [
    {"harden": Settings().harden}, {"repair": "finetune"}, {"finetune_epochs": 0}, {"score": "lipschitz", "mu": 50.0},
])  # fmt: skip
def test_nobody_is_hardened_who_does_not_ask_or_asks_for_something_else(told: dict[str, Any]) -> None:
    model, images, labels = innocent()
    result = sanitize(model, [(images, labels)], Settings(**{"harden": True, **told}))
    assert not result.report["repaired"] and result.report["hardening"] is None
    assert same(snapshot(model), snapshot(result.model))


def test_images_that_do_not_show_every_class_or_are_made_up_harden_nothing() -> None:
    model, images, labels = innocent()
    some = labels != int(labels[0])
    for shown in ([(images[some], labels[some])], StandIns((3, 16, 16), count=32)):
        result = sanitize(model, shown, Settings(harden=True))
        assert not result.plan.flagged and result.report["hardening"] is None
        assert "real images of every class" in result.report["repair"]  # who asks for it is told why not
        assert same(snapshot(model), snapshot(result.model))


def test_a_hardened_model_is_one_by_itself_in_the_summary_of_a_fleet() -> None:
    model, images, labels = innocent()
    outside = {"model": {"architecture": "a", "num_classes": CLASSES}}
    for told, state in ((True, "hardened"), (False, "unchanged")):
        report = sanitize(model, [(images, labels)], Settings(harden=told)).report
        assert summary({**report, **outside})["state"] == state


@pytest.mark.parametrize("told", [1, "yes", None])
def test_harden_is_true_or_false(told: Any) -> None:
    with pytest.raises(Exception, match="harden is true or false"):
        Settings(harden=told)
