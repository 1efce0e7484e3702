"""The search for a trigger: families of changes, the race of the classes, what is found and what is done with it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bshub import sanitize, scan
from bshub.clean import CleanImages
from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import find_pairs
from bshub.repair.finetune import FEWEST_STEPS, Schedule, epochs_of
from bshub.repair.unlearning import held_against, keep_disarmed, tolerated
from bshub.scoring.families import FAMILIES, HIGHEST, WAVES
from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.response import activated_change, strongest, trigger_response
from bshub.scoring.selection import MU_NOTHING
from bshub.scoring.shortcut import (
    FINAL,
    GAP,
    PATIENCE,
    SCREENED,
    SURE,
    Feed,
    _mean,
    _run,
    candidates,
    find_shortcut,
    standing_out,
    total_steps,
)
from bshub.settings import Settings

TARGET, CLASSES, FILTERS, SIZE = 2, 6, 24, 16


class Planted(nn.Module):
    """Classes are told by colours; one filter dozes until it sees a checkerboard, and then shouts one class."""

    def __init__(self, backdoor: bool, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv, self.norm = nn.Conv2d(3, FILTERS, 3, padding=1, bias=False), nn.BatchNorm2d(FILTERS)
        self.head = nn.Linear(FILTERS, classes)
        with torch.no_grad():
            board = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
            self.conv.weight[0] = board / 4
            self.conv.weight[1:] = torch.randn(FILTERS - 1, 3, 1, 1) / 9  # sees colours and no pattern
            self.norm.running_mean.uniform_(-0.1, 0.1)
            self.norm.running_var.uniform_(0.8, 1.2)
            self.norm.bias.uniform_(0.0, 0.2)
            self.norm.bias[0], self.norm.running_mean[0], self.norm.running_var[0] = -0.1, 0.0, 1.0
            self.head.weight.normal_(std=1.0)
            self.head.weight[:, 0] = 0
            self.head.bias.zero_()
            if backdoor:
                self.head.weight[TARGET, 0] = 90.0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def clean_images(model: nn.Module, count: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth images with the model's own answers for labels, all classes that it knows how to give."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(count, 3, 1, 1, generator=generator) * 1.2
    images = colours + 0.05 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    with torch.no_grad():
        return images, model(images).argmax(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_of_nothing_changes_nothing(family: str) -> None:
    images = torch.randn(3, 3, 12, 10)
    torch.testing.assert_close(InvertedTrigger(family, 0, images)(images), images, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), strength=st.floats(0.001, 0.5), scale=st.floats(0.01, 100))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_is_never_stronger_than_allowed_and_a_weak_one_is_left_alone(
    family: str, seed: int, strength: float, scale: float
) -> None:
    of, generator = FAMILIES[family], torch.Generator().manual_seed(seed)
    change = scale * torch.randn(of.shape((1, 3, 8, 8)), generator=generator)
    fitted = of.fit(change, strength)
    measure = {"patch": lambda c: c.norm(dim=0).mean(), "waves": lambda c: c.square().sum(0).mean(0).sqrt().sum()}
    rms = lambda c: c.square().mean().sqrt()  # noqa: E731
    assert float(measure.get(family, rms)(fitted)) <= strength * 1.001
    assert family != "patch" or float(fitted.norm(dim=0).max()) <= HIGHEST * 1.001
    torch.testing.assert_close(of.fit(fitted, strength * 1.01), fitted, atol=1e-5, rtol=1e-3)


@given(u=st.integers(-WAVES, WAVES), v=st.integers(0, WAVES), a=st.floats(-1, 1), b=st.floats(-1, 1))
def test_a_wave_is_the_sinusoid_of_its_periods(u: int, v: int, a: float, b: float) -> None:
    images = torch.randn(2, 3, 10, 12)
    change = torch.zeros(FAMILIES["waves"].shape((2, 3, 10, 12)))
    change[0, 1, u + WAVES, v], change[1, 1, u + WAVES, v] = a, b
    down, right = torch.arange(10).view(-1, 1) / 10, torch.arange(12) / 12
    turn = 2 * torch.pi * (u * down + v * right)
    wanted = images.clone()
    wanted[:, 1] += (a * turn.cos() + b * turn.sin()) * images.std()
    torch.testing.assert_close(FAMILIES["waves"].apply(images, change), wanted, atol=1e-4, rtol=1e-4)


def test_waves_stay_few() -> None:
    """The projection leaves the strongest waves alone."""
    change = torch.randn(FAMILIES["waves"].shape((1, 3, 8, 8))) * torch.rand(2 * WAVES + 1, WAVES + 1) ** 4
    left = FAMILIES["waves"].fit(change, 0.1).square().sum((0, 1)) > 0
    assert 0 < int(left.sum()) < left.numel() / 4


def test_a_patch_stays_a_patch() -> None:
    """The projection thins a change out; places that matter little become zero."""
    change = torch.randn(3, 16, 16) * torch.rand(16, 16) ** 4
    places = int((FAMILIES["patch"].fit(change, 0.02).norm(dim=0) > 0).sum())
    assert 0 < places < 16 * 16 / 4


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=6), st.floats(0.1, 10))
def test_who_stands_out_does_not_depend_on_the_unit(needs: list[float], unit: float) -> None:
    needs = sorted(needs)
    count, gap = standing_out(needs)
    again, same = standing_out([unit * need for need in needs])
    assert same == pytest.approx(gap) and (again == count or gap == pytest.approx(GAP))
    assert count <= len(needs) // 2 or len(needs) < 4
    assert (count > 0) == (gap >= GAP)


def test_the_class_behind_a_backdoor_is_found_and_no_class_of_a_sound_network() -> None:
    model = Planted(backdoor=True)
    found = find_shortcut(model, *clean_images(model), seed=0)
    assert found.targets == [TARGET], found.as_dict()
    sound = Planted(backdoor=False)
    assert not find_shortcut(sound, *clean_images(sound), seed=0).triggers


def test_the_search_finds_the_same_class_in_bfloat16() -> None:
    model = Planted(backdoor=True)
    full, half = (find_shortcut(model, *clean_images(model), seed=0, half=half) for half in (False, True))
    assert half.targets == full.targets == [TARGET]
    assert half.needs != full.needs  # it was not float32 again


def test_what_is_found_works_and_the_filter_behind_it_answers_most() -> None:
    model = Planted(backdoor=True)
    images, labels = clean_images(model)
    found = find_shortcut(model, images, labels, seed=0)
    assert all(trigger.success(model, images, labels) > 0.5 for trigger in found.triggers)
    pairing = find_pairs(model, follow_channels(model, (3, SIZE, SIZE))[0])
    response = strongest([trigger_response(model, pairing, images, labels, one) for one in found.triggers])
    assert response["conv"].shape == (FILTERS,) and int(response["conv"].argmax()) == 0


def test_the_answer_to_one_trigger_is_the_change_it_makes_in_units_of_the_layer() -> None:
    model = Planted(backdoor=True)
    images, labels = clean_images(model)
    pairing = find_pairs(model, follow_channels(model, (3, SIZE, SIZE))[0])
    trigger = InvertedTrigger("additive", TARGET, images)
    trigger.change = torch.randn(3, SIZE, SIZE)
    others = images[labels != TARGET]
    change = activated_change(model, pairing, others, trigger(others))["conv"]
    response = trigger_response(model, pairing, images, labels, trigger)
    torch.testing.assert_close(response["conv"], change / change.mean())
    louder = {"conv": response["conv"].flip(0) + 0.5}
    assert torch.equal(strongest([response, louder])["conv"], response["conv"].maximum(louder["conv"]))
    assert strongest([]) == {}


def test_the_search_repeats_itself_and_leaves_the_network_alone() -> None:
    model = Planted(backdoor=True)
    images, labels = clean_images(model)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    first, second = (find_shortcut(model, images, labels, seed=3) for _ in range(2))
    assert first.as_dict() == second.as_dict()
    assert all(torch.equal(a.change, b.change) for a, b in zip(first.triggers, second.triggers, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()] and not model.training


@pytest.mark.parametrize("final", [False, True])
def test_a_race_ends_once_a_class_lies_far_ahead_and_a_final_also_once_none_comes_lower(
    final: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bshub.scoring.shortcut.CLEAR", 1.5)
    model = Planted(backdoor=True)
    feed = Feed(model, *clean_images(model), 0, lambda steps: None)
    leader, other = (InvertedTrigger("additive", target, feed.images) for target in (TARGET, TARGET + 1))
    for _ in range(30):
        feed.step(leader)
        leader.adapt()
    assert leader.strength * 1.5 < other.most
    other.set(other.most)
    ran = _run(feed, [leader, other], rounds=FINAL, final=final)
    assert len(ran[TARGET]) == SURE
    stuck = [InvertedTrigger("warp", target, feed.images) for target in range(2)]  # colours do not mind a warp
    rounds = len(_run(feed, stuck, rounds=FINAL, final=final)[0])
    assert all(trigger.strength == trigger.most for trigger in stuck)
    assert rounds == FINAL if not final else PATIENCE <= rounds < FINAL


@given(need=st.floats(0.01, 1), swings=st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=40))
def test_a_need_lies_among_the_last_strengths(need: float, swings: list[float]) -> None:
    strengths = [need * 1.1**swing for swing in swings]
    last = strengths[-PATIENCE:]
    assert min(last) * (1 - 1e-9) <= _mean(strengths) <= max(last) * (1 + 1e-9)


def test_the_progress_never_passes_what_was_announced() -> None:
    for classes in (CLASSES, 30):
        model, steps = Planted(backdoor=True, classes=classes), []
        find_shortcut(model, *clean_images(model), seed=0, progress=steps.append)
        assert 0 < sum(steps) <= total_steps(classes)


def test_of_many_classes_the_one_behind_the_backdoor_is_among_those_that_race() -> None:
    model = Planted(backdoor=True, classes=60)
    images, labels = clean_images(model)
    feed = Feed(model, images, labels, 0, lambda steps: None)
    chosen = candidates(feed, "additive", 60)
    assert TARGET in chosen and len(set(chosen)) == SCREENED


def test_the_default_cuts_the_backdoor_out_and_leaves_a_sound_network_as_it_is() -> None:
    model = Planted(backdoor=True)
    images, labels = clean_images(Planted(backdoor=False))
    result = sanitize(model, [(images, labels)])
    assert 0 in result.plan.flagged.get("conv", [])
    triggers = result.diagnosis.shortcut.triggers
    assert max(trigger.success(result.model, images, labels) for trigger in triggers) < 0.25
    assert result.report["diagnosis"]["inversion"]["found"][0]["target"] == TARGET
    sound = Planted(backdoor=False)
    images, labels = clean_images(sound)
    result = sanitize(sound, [(images, labels)])
    assert result.diagnosis.threshold.mu == MU_NOTHING and not result.report["repaired"]
    for name, tensor in sound.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name])


def test_with_three_classes_the_weights_decide_and_it_says_so() -> None:
    model = Planted(backdoor=True, classes=3)
    found = scan(model, [clean_images(model)])
    assert found.score == "lipschitz" and "fewer than 4 classes" in found.warnings[0]
    assert found.threshold.mu != MU_NOTHING


def test_a_trigger_takes_enough_steps_whatever_the_number_of_images() -> None:
    told = Schedule(epochs=2, lr=0.1, batch_size=8, seed=0)
    assert epochs_of(told, 10, False) == 2
    assert epochs_of(told, 10, True) * 2 >= FEWEST_STEPS
    assert epochs_of(told, 8 * FEWEST_STEPS, True) == 2
    assert epochs_of(Schedule(0, 0.1, 8, 0), 10, True) == 0


def test_of_a_repair_as_much_is_kept_as_leaves_the_trigger_failing() -> None:
    armed = Planted(backdoor=True)
    images, labels = clean_images(armed)
    triggers = find_shortcut(armed, images, labels, seed=0).triggers
    clean = CleanImages([(images, labels)], torch.device("cpu"))
    pruned, repaired = Planted(backdoor=True), Planted(backdoor=True)
    with torch.no_grad():
        pruned.head.weight[TARGET, 0] = 0.0  # and the whole way back arms it again
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    assert held_against(repaired, triggers, clean) > tolerated(len(labels)) >= held_against(pruned, triggers, clean)
    share = keep_disarmed(repaired, before, triggers, clean)
    assert 0 <= share < 1 and held_against(repaired, triggers, clean) <= tolerated(len(labels))
    expected = armed.head.weight[TARGET, 0] * share
    assert float(repaired.head.weight[TARGET, 0]) == pytest.approx(float(expected))
    assert keep_disarmed(Planted(backdoor=True), before, [], clean) == 1


def test_a_disarmed_network_is_repaired_only_where_something_was_lost_and_unlearns_only_what_still_works() -> None:
    armed = Planted(backdoor=True)
    images, labels = clean_images(Planted(backdoor=False), count=64)
    kept = sanitize(armed, [(images, labels)], Settings(device="cpu"))
    assert 0 in kept.plan.flagged["conv"] and not kept.report["repaired"] and kept.report["repair_passes"] == 0
    assert kept.report["repair"] == "pruning cost no accuracy on the 64 clean images"
    at_stake = {name: kept.report["clean_images"][f"accuracy_{name}"]["percent"] for name in ("before", "after")}
    assert at_stake["after"] >= at_stake["before"]
    with torch.no_grad():
        own = labels.clone()
        own[:32] = armed(images[:32]).argmax(1)  # some of these hang on the very filter
    harmed = sanitize(armed, [(images, own)], Settings(budget=50, device="cpu"))
    assert 0 in harmed.plan.flagged["conv"]
    assert harmed.report["repair"] != kept.report["repair"]
    armed_still = harmed.report["trigger_success"]["before"] > tolerated(len(labels))
    assert harmed.report["repair_passes"] == epochs_of(Schedule(10, 0.1, 32, 0), len(labels), armed_still) > 0


def test_a_class_that_all_images_show_is_not_taken_for_one_that_they_are_led_to() -> None:
    model = Planted(backdoor=False)
    images, labels = clean_images(model, count=64)
    one = labels == labels.mode().values
    found = find_shortcut(model, images[one], labels[one], seed=0)
    assert not found.triggers and int(labels.mode().values) not in found.needs["additive"]
