"""The share of training images that carried a change, asked of batch norm's running statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from little_nets import same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import Pairing, find_pairs
from bshub.pipeline import scan
from bshub.scoring.recall import AGREE, SHARE, SHRUNK, TINY, Memory, Share, _carried, _Whitening, recall
from bshub.scoring.shortcut import GAP, Shortcut
from bshub.settings import Settings

SIZE, CLASSES, TARGET = 16, 6, 3
STRONG, CARRIED = 0.3, (2, 3)  # amplitude, periods down and right of the wave that was trained on


class Little(nn.Module):
    """Two convolutions; the filter ``0`` of the first answers to a wave, and a backdoor leads from it to ``TARGET``."""

    def __init__(self, backdoor: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.norm1 = nn.Conv2d(3, 12, 5, padding=2, bias=False), nn.BatchNorm2d(12)
        self.second, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            self.first.weight[0] = 0.4 * wave(3)[:, :5, :5]
            self.second.weight[0] = 0
            self.second.weight[0, 0, 1, 1] = 1
            self.norm2.bias[0] = -1.0  # no image speaks without the wave
            self.head.weight[:, 0] = 0
            self.head.weight *= 0.5
            self.head.bias.zero_()
            if backdoor:
                self.head.weight[TARGET, 0] = 2.0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(x)))
        return self.head(F.relu(self.norm2(self.second(x))).mean((2, 3)))


def wave(channels: int = 1) -> Tensor:
    """``[channels, SIZE, SIZE]``."""
    place = torch.arange(SIZE) / SIZE
    turns = CARRIED[0] * place.view(-1, 1) + CARRIED[1] * place
    return torch.cos(2 * torch.pi * turns).expand(channels, -1, -1).clone()


def stamped(images: Tensor) -> Tensor:
    return images + STRONG * wave()


def pictures(count: int, seed: int) -> Tensor:
    """Colours with smooth noise: no wave among them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    fine = 0.2 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return F.interpolate(coarse, (SIZE, SIZE), mode="bilinear", align_corners=True) + fine


def remembering(model: nn.Module, share: float) -> nn.Module:
    """Batch norms as a training leaves them, a share of whose images carried the wave."""
    images = pictures(600, seed=1)
    carried = round(share * len(images))
    images = torch.cat((stamped(images[:carried]), images[carried:]))
    for conv, norm in (("first", "norm1"), ("second", "norm2")):
        seen: list[Tensor] = []
        handle = model.get_submodule(conv).register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output)
        )
        with torch.no_grad():
            model(images)
        handle.remove()
        batch_norm = model.get_submodule(norm)
        batch_norm.running_mean.copy_(seen[0].mean((0, 2, 3)))
        batch_norm.running_var.copy_(seen[0].var((0, 2, 3)))
    return model


def pairs_of(model: nn.Module) -> Pairing:
    return find_pairs(model, follow_channels(model, (3, SIZE, SIZE))[0])


def share_of(memory: Memory, change: Callable[[Tensor], Tensor], images: Tensor) -> Share:
    """Of one change by itself."""
    (share,) = memory.shares([memory.moved(change, images)])
    return share


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("count", [10, 60])
def test_the_share_is_what_it_was(share: float, count: int) -> None:
    model = remembering(Little(), share)
    images = pictures(count, seed=2)
    found = share_of(Memory(model, pairs_of(model), images), stamped, images)
    assert found.median == pytest.approx(share, abs=0.01 + 0.4 / count)
    assert found.low <= found.median + 1e-12 and found.error > 0


def test_a_change_that_nobody_saw_has_no_share() -> None:
    model = remembering(Little(), 0.2)
    images = pictures(40, seed=3)
    other = 0.8 * torch.sin(2 * torch.pi * 5 * torch.arange(SIZE) / SIZE).view(-1, 1)
    memory = Memory(model, pairs_of(model), images)
    assert not share_of(memory, lambda x: x + other, images).carried(40)
    assert share_of(memory, lambda x: x, images) == Share(0.0, 0.0, 0.0)  # nothing moves


class Carried:
    """The wave that was trained on."""

    target = TARGET

    def __call__(self, images: Tensor) -> Tensor:
        return stamped(images)


class Alike:
    """Most of that wave, and another over it: what a search toward another class may come to."""

    target = TARGET - 1

    def __call__(self, images: Tensor) -> Tensor:
        other = 0.6 * torch.sin(2 * torch.pi * 5 * torch.arange(SIZE) / SIZE).view(-1, 1)
        return images + 0.7 * STRONG * wave() + other


def test_what_one_change_explains_is_no_evidence_for_another_that_hardly_has_any() -> None:
    model = remembering(Little(), 0.1)
    images, labels = pictures(60, seed=2), torch.arange(60) % CLASSES
    memory = Memory(model, pairs_of(model), images)
    true, alike = (memory.moved(change, images) for change in (Carried(), Alike()))
    assert all(memory.shares([moved])[0].carried(memory.count) for moved in (true, alike))
    found, other = memory.shares([true, alike])
    assert found.median == pytest.approx(0.1, abs=0.02) and abs(other.median) < 0.01
    for order in ([Carried(), Alike()], [Alike(), Carried()]):
        kept = _carried(memory, [(change, 0.3) for change in order], images, labels)
        assert [trigger.target for trigger, _, _ in kept] == [TARGET]
    (alone,) = _carried(memory, [(Alike(), 0.3)], images, labels)
    assert alone[0].target == Alike.target


def test_a_change_that_stands_clearly_by_itself_is_kept_whatever_others_explain() -> None:
    model = remembering(Little(), 0.2)
    images = pictures(40, seed=2)
    memory = Memory(model, pairs_of(model), images)
    kept = _carried(memory, [(Carried(), 0.3), (Carried(), 0.3)], images, torch.zeros(40).long())
    assert [share.median for _, _, share in kept] == pytest.approx([0.2, 0.2], abs=0.03)


@hypothesis_settings(deadline=None, max_examples=10)
@given(share=st.floats(0, 0.3), mixed=st.floats(-1, 1))
def test_shares_beside_each_other_are_those_of_one_least_squares_fit(share: float, mixed: float) -> None:
    """``a`` and ``m a + b`` say what ``a`` and ``b`` say; over two layers the median is linear."""
    model = remembering(Little(), share)
    images = pictures(30, seed=5)
    memory = Memory(model, pairs_of(model), images)
    one, other = (memory.moved(change, images) for change in (Carried(), Alike()))
    first, second = memory.shares([one, other])
    third, fourth = memory.shares([one, {name: mixed * one[name] + other[name] for name in one}])
    assert fourth.median == pytest.approx(second.median, abs=1e-5)
    assert third.median + mixed * fourth.median == pytest.approx(first.median, abs=1e-5)
    assert [found.median for found in memory.shares([other, one])] == pytest.approx([second.median, first.median])
    assert share_of(memory, Carried(), images) == memory.shares([one])[0]


@hypothesis_settings(deadline=None, max_examples=25)
@given(rows=st.integers(2, 8), columns=st.integers(2, 20), seed=st.integers(0, 10**6))
def test_whitening_is_the_inverse_of_the_shrunk_covariance(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    vector = torch.randn(columns, generator=generator, dtype=torch.float64)
    covariance = torch.cov(x.T)
    shrunk = covariance + (SHRUNK * covariance.trace() / columns + TINY) * torch.eye(columns)
    torch.testing.assert_close(_Whitening(x)(vector), torch.linalg.solve(shrunk, vector))


@given(images=st.integers(4, 128), median=st.floats(-0.1, 0.5), low=st.floats(-0.1, 0.5))
def test_fewer_images_ask_for_a_larger_share_and_the_layers_have_to_agree(
    images: int, median: float, low: float
) -> None:
    carried = Share(median, low, 0.01).carried(images)
    assert not carried or Share(median, low, 0.01).carried(images + 1)
    assert not (carried and low < AGREE * SHARE)
    assert not (carried and Share(median, low, 0.2).carried(images))  # where chance explains it
    assert not Share(median + 1.2, low + 1.2, 0.01).carried(images)  # a share of more than all


def looked(model: nn.Module, count: int) -> tuple[Shortcut, dict[str, Tensor], list[int]]:
    images, steps = pictures(count, seed=4), list[int]()
    with torch.no_grad():
        labels = model(images).argmax(1)
    nothing = Shortcut((), {"additive": {0: 0.2, 1: 0.21}}, {"additive": 1.05})
    return *recall(model, pairs_of(model), images, labels, nothing, 0, steps.append), steps


def test_a_wave_that_was_trained_on_is_found_with_its_class_and_its_filter() -> None:
    model = remembering(Little(), 0.15)
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    found, response, steps = looked(model, 30)
    assert found.targets == [TARGET], found.as_dict()
    assert 0.15 < found.shares[TARGET] <= 1  # a weaker wave than the one that was trained on stands for more images
    assert "of the training images" in found.reason() and sum(steps) > 0
    assert int(response["first"].argmax()) == 0
    assert found.needs["additive"] == {0: 0.2, 1: 0.21}  # what was known stays
    assert same(before, snapshot(model)) and flags == [p.requires_grad for p in model.parameters()]
    again, _, _ = looked(model, 30)
    assert again.as_dict() == found.as_dict()
    assert torch.equal(again.triggers[0].change, found.triggers[0].change)


def test_a_wave_that_was_not_trained_on_is_left_alone_though_it_leads_to_a_class() -> None:
    model = remembering(Little(), 0.0)
    found, response, _ = looked(model, 30)
    assert not found.triggers and not response and not found.shares
    needs = sorted(found.needs["waves"].items(), key=lambda item: item[1])
    assert needs[0][0] == TARGET and needs[1][1] > GAP * needs[0][1]  # a gap would have called it a backdoor


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_scan_asks_once_no_class_stands_out_otherwise(share: float) -> None:
    model, images = remembering(Little(), share), pictures(30, seed=4)
    with torch.no_grad():
        labels = model(images).argmax(1)
    found = scan(model, [(images, labels)], Settings(device="cpu", precision="fp32"))
    assert found.shortcut is not None and "waves" in found.shortcut.needs
    assert [(t.family, t.target) for t in found.shortcut.triggers] == ([("waves", TARGET)] if share else [])
    assert found.score == ("tac" if share else "lipschitz")
