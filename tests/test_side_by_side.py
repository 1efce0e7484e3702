"""Work on one network by several threads: the same numbers, nothing mixed up, nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from little_nets import Mixed, coloured_images
from nets import randomize_batch_norm
from torch import Tensor, nn

from bshub.scoring.shortcut import find_shortcut
from bshub.side_by_side import side_by_side, twin

MEETING = threading.Barrier(2, timeout=20)


class Keeper(nn.Module):
    """Keeps its input in itself while another thread runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.kept: Tensor = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        MEETING.wait()
        return self.kept * self.weight


@pytest.fixture
def cores() -> Iterator[None]:
    """Whatever a test sets, the next finds the number as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_twin_shares_every_weight_and_no_module() -> None:
    model = randomize_batch_norm(Mixed())
    other = twin(model)
    ours, theirs = model.state_dict(keep_vars=True), other.state_dict(keep_vars=True)
    assert list(ours) == list(theirs) and all(ours[name] is theirs[name] for name in ours)
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("available", [2, 3])
def test_the_search_comes_to_the_same_bits_on_any_number_of_cores(available: int) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(Mixed())
    images, labels = coloured_images(24)
    found = []
    for number in (1, available):
        torch.set_num_threads(number)
        # 1.0: something is always found, and with it a change to compare
        found.append(find_shortcut(model, images, labels, seed=0, least=1.0))
    alone, together = found
    assert alone.triggers and alone.needs == together.needs
    for a, b in zip(alone.triggers, together.triggers, strict=True):
        assert a.target == b.target and torch.equal(a.change, b.change)


@pytest.mark.usefixtures("cores")
def test_what_a_module_keeps_of_one_run_is_not_seen_by_another() -> None:
    torch.set_num_threads(2)
    inputs = [torch.full((1,), float(i)) for i in range(6)]  # even: nobody waits for a partner in vain
    answers = {}

    def work(model: nn.Module, own: Tensor) -> None:
        answers[float(own)] = float(model(own))

    with side_by_side(Keeper(), len(inputs)) as each:
        each(work, inputs)
    assert answers == {float(x): float(x) for x in inputs}


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("available", [1, 2, 4])
def test_an_error_comes_through_and_the_cores_come_back(available: int) -> None:
    torch.set_num_threads(available)

    def work(model: nn.Module, number: int) -> None:
        if number == 3:
            raise KeyError(number)

    with pytest.raises(KeyError, match="3"), side_by_side(Mixed(), 5) as each:
        each(work, range(5))
    assert torch.get_num_threads() == available


@pytest.mark.usefixtures("cores")
def test_every_piece_is_done_once_and_the_cores_are_shared_out() -> None:
    torch.set_num_threads(4)
    done: list[int] = []
    threads = []

    def work(model: nn.Module, number: int) -> None:
        done.append(number)
        threads.append(torch.get_num_threads())

    with side_by_side(Mixed(), 2) as each:
        each(work, range(7))
        each(work, range(7, 9))
    assert sorted(done) == list(range(9)) and set(threads) == {2}
