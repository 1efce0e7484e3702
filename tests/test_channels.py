"""Coupling: connected components, groups, pins and their reasons."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Apply, Concat, Gate, Halves, Net, Shuffle, conv_bn, head, residual_net, vgg_like
from torch import nn

from bshub.graph.channels import ALIVE, CONSTANT, ZERO, Channels, Lane, connected_components


def groups_by_hand(count: int, edges: list[tuple[int, int]]) -> list[int]:
    """Relabel until nothing changes: slow and obviously right."""
    label = list(range(count))
    for a, b in edges:
        low, high = sorted((label[a], label[b]))
        label = [low if x == high else x for x in label]
    return label


def slots(net: Net, name: str, axis: int = 0) -> np.ndarray:
    """Groups of one parameter axis."""
    return net.flow.groups[net.flow.channels.axes[name][axis]]


def net_of(*modules: nn.Module, size: int = 16) -> Net:
    torch.manual_seed(0)
    return Net(nn.Sequential(*modules), size)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_components_are_those_of_a_brute_force_union(graph: tuple[int, list[tuple[int, int]]]) -> None:
    count, edges = graph
    a, b = np.array([e[0] for e in edges], np.int64), np.array([e[1] for e in edges], np.int64)
    assert connected_components(count, a, b).tolist() == groups_by_hand(count, edges)


@pytest.mark.parametrize("order", [1, -1])
def test_components_of_a_long_chain_are_one(order: int) -> None:
    nodes = np.arange(5000)[::order]
    assert not connected_components(5000, nodes[:-1], nodes[1:]).any()


def test_without_edges_everyone_is_alone() -> None:
    empty = np.empty(0, np.int64)
    assert connected_components(3, empty, empty).tolist() == [0, 1, 2]
    assert connected_components(0, empty, empty).tolist() == []


def test_components_do_not_change_their_arguments() -> None:
    a, b = np.array([3, 1]), np.array([1, 0])
    connected_components(4, a, b)
    assert (a.tolist(), b.tolist()) == ([3, 1], [1, 0])


def test_the_first_pin_gives_the_reason_and_reaches_the_whole_group() -> None:
    channels = Channels()
    a, b = (channels.parameter(name, (3,)).lanes[0] for name in "ab")
    assert a is not None and b is not None
    channels.couple(a, b)
    channels.pin(b.take(np.array([1])), "first")
    channels.pin(a, "second")
    pinned = channels.pinned(channels.groups())
    assert sorted(pinned.values()) == ["first", "second", "second"]
    assert pinned[int(channels.groups()[a.slots[1]])] == "first"


@pytest.mark.parametrize(
    ("rule", "left", "right", "level"),
    [
        ("add", ZERO, ZERO, ZERO),
        ("add", ZERO, CONSTANT, CONSTANT),
        ("add", ZERO, ALIVE, ALIVE),
        ("multiply", ZERO, ALIVE, ZERO),
        ("multiply", CONSTANT, ALIVE, ALIVE),
        ("multiply", CONSTANT, CONSTANT, CONSTANT),
        ("multiply", ALIVE, ALIVE, ALIVE),
    ],
)
def test_levels_of_a_combination(rule: str, left: int, right: int, level: int) -> None:
    channels = Channels()
    a, b = channels.new_values(1), channels.new_values(1)
    silenced = [v for v, wanted in ((a, left), (b, right)) if wanted != ALIVE]
    streams = [channels.derive("offset", v) if wanted == CONSTANT else v for v, wanted in ((a, left), (b, right))]
    result = channels.derive(rule, *streams)
    levels = channels.levels(np.concatenate([*silenced, np.empty(0, np.int64)]))
    assert levels[result] == level


def test_a_parameter_seen_twice_has_the_same_variables() -> None:
    channels = Channels()
    first, second = (channels.parameter("w", (4, 3)).lanes[0] for _ in range(2))
    assert isinstance(first, Lane) and isinstance(second, Lane)
    assert first.slots.tolist() == second.slots.tolist()
    assert channels.variables == 7


def test_a_chain_couples_a_filter_with_its_norm_and_its_reader_alone() -> None:
    net = net_of(conv_bn(3, 8, bias=True), conv_bn(8, 6), head(6))
    groups = slots(net, "0.0.weight")
    assert len(set(groups)) == 8
    for name in ("0.0.bias", "0.1.weight", "0.1.bias", "0.1.running_mean", "0.1.running_var"):
        assert slots(net, name).tolist() == groups.tolist()
    assert slots(net, "1.0.weight", 1).tolist() == groups.tolist()
    assert not set(groups) & set(slots(net, "1.0.weight"))


def test_a_residual_sum_couples_its_writers() -> None:
    net = Net(residual_net(8, 2))
    stream = slots(net, "0.0.weight").tolist()
    assert slots(net, "1.body.1.weight").tolist() == stream
    assert slots(net, "2.body.1.weight").tolist() == stream
    assert slots(net, "3.2.weight", 1).tolist() == stream
    assert not set(slots(net, "1.body.0.0.weight")) & set(stream)


def test_a_flattened_map_is_read_in_blocks_of_columns() -> None:
    net = Net(vgg_like())
    assert slots(net, "6.weight", 1).tolist() == np.repeat(slots(net, "4.0.weight"), 16).tolist()


def test_a_concatenation_joins_the_branches_in_order() -> None:
    net = net_of(conv_bn(3, 8), Concat(conv_bn(8, 4), conv_bn(8, 6), nn.Identity()), conv_bn(18, 5), head(5))
    parts = [slots(net, name) for name in ("1.branches.0.0.weight", "1.branches.1.0.weight", "0.0.weight")]
    assert slots(net, "2.0.weight", 1).tolist() == np.concatenate(parts).tolist()


def test_a_depthwise_multiplier_repeats_each_input() -> None:
    net = net_of(conv_bn(3, 4), conv_bn(4, 12, groups=4), conv_bn(12, 5), head(5))
    assert slots(net, "1.0.weight").tolist() == np.repeat(slots(net, "0.0.weight"), 3).tolist()


def test_groups_of_a_convolution_stay_equal() -> None:
    net = net_of(conv_bn(3, 8), conv_bn(8, 12, groups=4), conv_bn(12, 5), head(5))
    assert slots(net, "0.0.weight").reshape(4, 2).tolist() == [slots(net, "0.0.weight")[:2].tolist()] * 4
    assert slots(net, "1.0.weight").reshape(4, 3).tolist() == [slots(net, "1.0.weight")[:3].tolist()] * 4


def test_a_shuffle_permutes_and_keeps_the_rows_equal() -> None:
    net = net_of(conv_bn(3, 6), Shuffle(2), conv_bn(6, 5), head(5))
    before, after = slots(net, "0.0.weight"), slots(net, "2.0.weight", 1)
    assert before[:3].tolist() == before[3:].tolist()
    assert after.tolist() == before.reshape(2, 3).T.ravel().tolist()


def test_equal_halves_stay_equal() -> None:
    net = net_of(conv_bn(3, 8), Halves(conv_bn(4, 6)), conv_bn(10, 5), head(5))
    assert slots(net, "0.0.weight")[:4].tolist() == slots(net, "0.0.weight")[4:].tolist()


def test_a_gate_leaves_with_what_it_scales_and_its_bottleneck_is_free() -> None:
    net = net_of(conv_bn(3, 8), Gate(8, 4), conv_bn(8, 5), head(5))
    assert slots(net, "1.up.weight").tolist() == slots(net, "0.0.weight").tolist()
    assert slots(net, "1.down.weight", 1).tolist() == slots(net, "0.0.weight").tolist()
    assert not set(slots(net, "1.down.weight").tolist()) & set(net.flow.pinned)


def test_the_classifier_stays() -> None:
    net = Net(residual_net())
    reasons = {net.flow.pinned.get(group, "") for group in slots(net, "3.2.weight").tolist()}
    assert reasons == {"it is an output of the model"}
    assert slots(net, "3.2.bias").tolist() == slots(net, "3.2.weight").tolist()


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: torch.roll(x, 1, 1), "1: roll has no channel rule"),
        (lambda x: x[:, [3, 1, 2, 0, 7, 6, 5, 4]], "1: index has no channel rule"),
        (lambda x: x.flip(1), "1: flip has no channel rule"),
        (lambda x: x.cumsum(1), "1: cumsum runs along the channels"),
        (lambda x: x.softmax(1), "1: _softmax runs along the channels"),
        (lambda x: x - x.mean(1, keepdim=True), "1: mean sums over the channels"),
        (lambda x: torch.cat([x[:, :2], x[:, 2:]], 1), "1: slice cuts a range of the channels"),
        (lambda x: nn.functional.layer_norm(x, x.shape[1:]), "1: native_layer_norm normalises over the channels"),
        (lambda x: nn.functional.group_norm(x, 2), "1: native_group_norm normalises over the channels"),
    ],
)
def test_what_works_across_channels_pins_with_module_and_op_and_the_rest_is_exact(function: object, why: str) -> None:
    net = net_of(conv_bn(3, 8), Apply(function), conv_bn(8, 6), head(6))
    removal = net.remove_exactly({"0.0": [1, 6], "2.0": [2]})
    assert removal.plan.silenced == {"0.0": [1, 6]}
    assert removal.plan.removed == {"2.0": [2]}
    assert removal.plan.stays == {"0.0": why}
    assert removal.refused == []


def test_a_cut_at_numbers_in_code_stays_and_the_rest_leaves() -> None:
    swap = Apply(lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1))
    removal = net_of(conv_bn(3, 8), swap, conv_bn(8, 6), head(6)).remove_exactly({"0.0": [1, 6], "2.0": [2]})
    assert removal.plan.silenced == {"0.0": [1, 6]}
    assert removal.plan.removed == {"2.0": [2]}


def test_channels_beside_the_raw_image_leave_and_the_image_stays() -> None:
    net = net_of(Concat(conv_bn(3, 8), nn.Identity()), conv_bn(11, 6), head(6))
    removal = net.remove_exactly({"0.branches.0.0": [0, 7]})
    assert removal.plan.removed == {"0.branches.0.0": [0, 7]}
    assert removal.model[1][0].in_channels == 9
