"""Which filters are useless, and what leaves with them: whole groups, proved, never as zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from little_nets import Dense, Mixed, coloured_images, train
from nets import Gate, Net, assert_equals_masked, conv_bn, head, residual_net, vgg_like
from torch import nn
from torch.nn import functional as F

from bshub.errors import UsageError
from bshub.pipeline import scan
from bshub.scoring.plan import make_plan
from bshub.scoring.statistics import measure
from bshub.scoring.usefulness import MOST_OF_A_LAYER, spare_order, taken, usefulness
from bshub.settings import Settings
from bshub.surgery.remove import remove, silence

QUICK: dict[str, Any] = {"mu": 1.5, "finetune_epochs": 0, "device": "cpu"}


def batches(n: int = 24, size: int = 8) -> list:
    images, labels = coloured_images(n, seed=77)
    return list(zip(images.split(size), labels.split(size), strict=True))


def gated() -> nn.Sequential:
    return nn.Sequential(conv_bn(3, 12), conv_bn(12, 12, groups=12), Gate(12, 4), conv_bn(12, 10, 1), head(10))


NETS = {
    "residual": residual_net,
    "straight": vgg_like,
    "dense": lambda: nn.Sequential(Dense()),
    "depthwise": lambda: nn.Sequential(Mixed()),
    "gated": gated,
}


def arrays(filters: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(index, np.int64) for name, index in filters.items()}


def prepared(kind: str, suspicious: float = 0.1) -> tuple[Net, list]:
    torch.manual_seed(3)
    net = Net(NETS[kind]())
    statistics = measure(net.model, net.pairing, [(net.images, torch.arange(4) % 3)], taylor=True)
    flagged = {name: index.tolist() for name, index in net.flags(suspicious, seed=2).items()}
    return net, [flagged, spare_order(net.flow, net.pairing, statistics, flagged)]


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
