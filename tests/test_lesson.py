"""What a repair shows where a trigger is unlearned, and what it costs to unlearn one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from little_nets import same, snapshot
from test_inversion import TARGET, Planted, clean_images
from test_likeness import natural, planted
from torch import Tensor, nn

from bshub.mending import WORSE
from bshub.repair import trial
from bshub.repair.finetune import FEW, Schedule, repair
from bshub.repair.lesson import LEAST_OWN, STRONGEST, stamped, with_mixtures
from bshub.repair.trial import cost_of_unlearning
from bshub.repair.unlearning import by_chance
from bshub.scoring.confirmation import COST
from bshub.scoring.inversion import InvertedTrigger

SHORT = Schedule(epochs=1, lr=0.002, batch_size=8, seed=3)


@contextmanager
def sizes_seen(model: nn.Module) -> Iterator[list[int]]:
    """Lengths of the batches that the model learns from."""
    seen: list[int] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and next(model.parameters()).requires_grad:
            seen.append(len(args[0]))

    hook = model.register_forward_pre_hook(note)
    yield seen
    hook.remove()


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 9), plain=st.integers(0, 12), size=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_a_mixture_is_mostly_the_image_that_gives_it_its_label_and_the_rest_another_one(
    n: int, plain: int, size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(n, 2, 3, 3, generator=generator), torch.arange(n)
    shown, wanted = with_mixtures(images, labels, plain, size, generator)
    assert shown.shape == (size, 2, 3, 3) and wanted.shape == (size,)
    kept = min(n, plain, size)
    assert torch.equal(shown[:kept], images[:kept]) and torch.equal(wanted[:kept], labels[:kept])
    for mixture, label in zip(shown[kept:], wanted[kept:].tolist(), strict=True):
        own, fits = images[label], []
        for other in (images[i].flip(2) for i in range(n) if i != label or n == 1):
            rest = own - other
            share = float((mixture - other).flatten() @ rest.flatten() / rest.square().sum().clamp_min(1e-12))
            mixed = share * own + (1 - share) * other
            fits.append(LEAST_OWN - 1e-4 <= share <= 1 + 1e-4 and torch.allclose(mixed, mixture, atol=1e-4))
        assert any(fits)


def test_a_trigger_is_shown_at_strengths_from_its_own_to_twice_that_of_each_image_its_own() -> None:
    model = Planted(backdoor=True)
    images, labels = clean_images(model, count=24)
    trigger = planted(images)
    trigger.change, trigger.strength = trigger.change / 20, 0.1
    twin, before = trigger.copy(), snapshot(model)
    shown = stamped(model, trigger, images, labels, torch.Generator().manual_seed(1))
    assert not torch.equal(trigger.change, twin.change)  # it was sharpened
    change = trigger(images) - images
    strengths = (shown - images).flatten(1).norm(dim=1) / change.flatten(1).norm(dim=1)
    torch.testing.assert_close(shown, images + strengths.view(-1, 1, 1, 1) * change, atol=1e-5, rtol=1e-4)
    assert 1 <= float(strengths.min()) < 1.3 < 1.7 < float(strengths.max()) <= STRONGEST
    again = stamped(model, twin, images, labels, torch.Generator().manual_seed(1))
    assert torch.equal(again, shown) and same(before, snapshot(model))


@pytest.mark.parametrize(("method", "count", "triggers", "size"), [
    ("distil", FEW, True, 8 + 8),  # half of the eight are mixtures, and all again with the trigger
    ("distil", FEW - 2, True, 16 + 8),  # few images: as many mixtures again, without it
    ("distil", FEW, False, 8), ("finetune", FEW - 2, False, 8), ("finetune", FEW - 2, True, 8 + 8),
])  # fmt: skip
def test_what_a_step_shows(method: str, count: int, triggers: bool, size: int) -> None:
    model = Planted(backdoor=True)
    images, labels = clean_images(model, count=count)
    used = [planted(images)] if triggers else []
    with sizes_seen(model) as seen:
        repair(model, copy.deepcopy(model), images, labels, {}, method, SHORT, triggers=used)
    assert seen[0] == size


def test_labels_alone_are_learned_from_images_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """``finetune`` is the paper's: a label says nothing about a mixture."""
    monkeypatch.setattr("bshub.repair.finetune.with_mixtures", lambda *told: pytest.fail("mixtures were shown"))
    model = Planted(backdoor=True)
    repair(model, copy.deepcopy(model), *clean_images(model), {}, "finetune", SHORT)


def test_a_backdoor_is_unlearned_at_little_cost_and_the_natural_way_to_a_class_is_not() -> None:
    model, innocent = Planted(backdoor=True), Planted(backdoor=False)
    images, labels = clean_images(innocent, count=12)
    before = snapshot(model)
    backdoor, way = planted(images), natural(*clean_images(innocent, count=96))
    changes = backdoor.change.clone(), way.change.clone()
    backdoor.strength = way.strength = 0.5
    cheap, dear = (cost_of_unlearning(model, t, images, labels, seed=0) for t in (backdoor, way))
    assert 0 <= cheap < COST < dear
    assert cost_of_unlearning(model, backdoor, images, labels, seed=0) == cheap
    assert same(before, snapshot(model))
    assert torch.equal(backdoor.change, changes[0]) and torch.equal(way.change, changes[1])


def test_of_many_images_a_trial_takes_a_few_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand images of a thousand classes must not take a thousand steps."""
    taken: list[Tensor] = []
    monkeypatch.setattr(trial, "repair", lambda *told, **more: taken.append(told[3]))
    images = torch.randn(1000, 3, 16, 16)
    trigger = InvertedTrigger("patch", TARGET, images)
    assert cost_of_unlearning(Planted(backdoor=True), trigger, images, torch.arange(1000), seed=0) == 0
    assert len(taken[0]) < FEW and int(taken[0][0]) == 0 and int(taken[0][-1]) == 999


@given(images=st.integers(1, 2000))
def test_a_single_image_of_ten_undoes_no_repair_and_a_tenth_of_many_does(images: int) -> None:
    allowed = by_chance(WORSE, images)
    assert allowed > WORSE and (not 8 <= images <= 10 or allowed * images >= 1) and (images < 60 or allowed < 0.08)
