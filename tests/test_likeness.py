"""A change that shows the network what real images of the class show it is the natural way there, and no backdoor."""

from __future__ import annotations

import pytest
import torch
from test_inversion import SIZE, TARGET, Planted, clean_images
from torch import Tensor, nn

from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import Pairing, find_pairs
from bshub.scoring import response
from bshub.scoring.confirmation import COST, UNSEEN, confirm
from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.likeness import FEWEST, LIKE, NATURAL, likeness
from bshub.scoring.response import activated_change, mean_maps
from bshub.scoring.shifted import Shifted
from bshub.scoring.shortcut import Shortcut


@pytest.fixture
def net() -> tuple[nn.Module, Pairing, Tensor, Tensor]:
    """A network with a backdoor, its pairs, and clean images of all classes."""
    model = Planted(backdoor=True)
    images, labels = clean_images(Planted(backdoor=False), count=96)
    return model, find_pairs(model, follow_channels(model, (3, SIZE, SIZE))[0]), images, labels


def change_of(images: Tensor, change: Tensor) -> InvertedTrigger:
    trigger = InvertedTrigger("additive", TARGET, images)
    trigger.change = change / images.std()
    return trigger


def natural(images: Tensor, labels: Tensor) -> InvertedTrigger:
    """The difference between the mean of the class and that of all others."""
    own, others = images[labels == TARGET].mean(0), images[labels != TARGET].mean(0)
    return change_of(images, own - others)


def planted(images: Tensor) -> InvertedTrigger:
    """The checkerboard that the backdoor's filter waits for."""
    rows, columns = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    return change_of(images, (1.0 - 2.0 * ((rows + columns) % 2)).expand(3, -1, -1) * 0.5)


def test_it_is_the_correlation_of_the_two_differences(net: tuple[nn.Module, Pairing, Tensor, Tensor]) -> None:
    model, pairing, images, labels = net
    trigger = planted(images)

    def means(part: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.relu(model.norm(model.conv(part))).mean((2, 3))  # (n, out)

    own, others = images[labels == TARGET], images[labels != TARGET]
    plain = means(others)
    spread = plain.std(0) + 0.1 * plain.std(0).mean() + 1e-6
    led, real = ((means(part).mean(0) - plain.mean(0)) / spread for part in (trigger(others), own))
    expected = torch.corrcoef(torch.stack([led, real]))[0, 1]
    assert likeness(model, pairing, images, labels, trigger) == pytest.approx(float(expected), abs=1e-4)


def test_the_way_of_the_class_is_like_it_and_a_backdoor_is_not(net: tuple[nn.Module, Pairing, Tensor, Tensor]) -> None:
    model, pairing, images, labels = net
    found = [likeness(model, pairing, images, labels, t) for t in (natural(images, labels), planted(images))]
    assert found[0] is not None and found[1] is not None and found[0] > 0.9 > LIKE > found[1]


def test_of_too_few_images_nothing_is_said(net: tuple[nn.Module, Pairing, Tensor, Tensor]) -> None:
    model, pairing, images, labels = net
    few = torch.cat([(labels == TARGET).nonzero()[: FEWEST - 1, 0], (labels != TARGET).nonzero()[:, 0]])
    assert likeness(model, pairing, images[few], labels[few], planted(images)) is None
    only = labels == TARGET
    assert likeness(model, pairing, images[only], labels[only], planted(images)) is None


def test_a_natural_way_is_set_aside_unless_its_gap_is_beyond_what_is_natural_or_the_images_are_made_up(
    net: tuple[nn.Module, Pairing, Tensor, Tensor],
) -> None:
    model, pairing, images, labels = net
    ways = {"natural": natural(images, labels), "planted": planted(images)}

    def judged(way: str, gap: float, made_up: bool = False) -> Shortcut:
        found = Shortcut((ways[way],), {}, {"additive": gap})
        left, answers = confirm(model, pairing, images, labels, found, Shifted({}, 0.03, 0.03), made_up)
        assert bool(answers) is bool(left.triggers)
        return left

    left = judged("natural", 2.0)
    assert not left.triggers and left.natural == (ways["natural"],)
    assert "or cannot be unlearned without loss: additive toward class 2" in left.reason()
    assert left.as_dict()["natural"] == [{"family": "additive", "target": TARGET}]
    for kept in (judged("planted", 2.0), judged("natural", NATURAL), judged("natural", 2.0, made_up=True)):
        assert len(kept.triggers) == 1 and not kept.natural


@pytest.mark.parametrize(("family", "gap", "remembers", "believed"), [
    ("patch", UNSEEN - 0.01, None, False), ("patch", UNSEEN, None, True), ("additive", 1.5, None, True),
    ("patch", 1.5, "it", True), ("patch", UNSEEN - 0.01, "another", False),
])  # fmt: skip
def test_with_too_few_images_of_the_class_a_patch_needs_a_wide_gap_or_that_batch_norm_remembers_it(
    net: tuple[nn.Module, Pairing, Tensor, Tensor], family: str, gap: float, remembers: str | None, believed: bool
) -> None:
    model, pairing, images, labels = net
    few = torch.cat([(labels == TARGET).nonzero()[:1, 0], (labels != TARGET).nonzero()[:, 0]])
    trigger = InvertedTrigger(family, TARGET, images)
    trigger.change = planted(images).change
    found = Shortcut((trigger,), {}, {family: gap})
    answers = response.trigger_response(model, pairing, images, labels, trigger)["conv"]
    shift = torch.zeros(len(answers))
    shift[answers.argmax() if remembers == "it" else answers.argmin()] = 1.0
    shifted = Shifted({"conv": shift}, 0.03, 0.03) if remembers else None
    left, _ = confirm(model, pairing, images[few], labels[few], found, shifted)
    assert (left.triggers == (trigger,)) is believed and (left.natural == (trigger,)) is not believed


@pytest.mark.parametrize(("own", "cost", "believed"), [(1, COST, True), (1, COST + 0.01, False), (FEWEST, 0.0, None)])
def test_with_too_few_images_of_the_class_a_patch_is_believed_that_can_be_unlearned_at_little_cost(
    net: tuple[nn.Module, Pairing, Tensor, Tensor], own: int, cost: float, believed: bool | None
) -> None:
    """With enough of them likeness tells, and nobody pays for a trial."""
    model, pairing, images, labels = net
    some = torch.cat([(labels == TARGET).nonzero()[:own, 0], (labels != TARGET).nonzero()[:, 0]])
    trigger = InvertedTrigger("patch", TARGET, images)
    trigger.change = natural(images, labels).change
    asked: list[InvertedTrigger] = []
    found = Shortcut((trigger,), {}, {"patch": UNSEEN - 0.01})

    def cost_of(doubtful: InvertedTrigger) -> float:
        asked.append(doubtful)
        return cost

    left, _ = confirm(model, pairing, images[some], labels[some], found, None, cost=cost_of)
    assert (left.triggers == (trigger,)) is bool(believed) and (left.natural == (trigger,)) is not bool(believed)
    assert asked == ([] if believed is None else [trigger])


def test_large_images_run_in_smaller_parts_with_the_same_outcome(
    net: tuple[nn.Module, Pairing, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairing, images, _ = net
    stamped = planted(images)(images)
    whole = activated_change(model, pairing, images, stamped)["conv"], mean_maps(model, pairing, images)["conv"]
    monkeypatch.setattr(response, "PIXELS", 7 * SIZE * SIZE)
    assert max(map(len, response._parts(images))) == 7
    parts = activated_change(model, pairing, images, stamped)["conv"], mean_maps(model, pairing, images)["conv"]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
