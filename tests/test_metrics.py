"""Rates, intervals and what counts as an attack."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from little_nets import Mixed, same, snapshot
from nets import randomize_batch_norm
from torch import Tensor, nn

from bshub.errors import TriggerError
from bshub.evaluation.metrics import (
    Z95,
    AccuracyLost,
    Evaluation,
    Rate,
    accuracy_lost,
    clean_accuracy,
    der,
    evaluate_models,
)


class Oracle(nn.Module):
    """Answers with the number that stands in an image's first pixel, plus ``shift``."""

    def __init__(self, shift: int = 0, classes: int = 10) -> None:
        super().__init__()
        self.shift, self.classes = shift, classes
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        answer = (x[:, 0, 0, 0].long() + self.shift) % self.classes
        return nn.functional.one_hot(answer, self.classes).float()


def images_saying(*answers: int) -> Tensor:
    return torch.tensor(answers, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # computed by hand from (p + z²/2n ± z√(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.95996
    [(0, 50, 0.0, 7.1), (50, 50, 92.9, 100.0), (0, 10, 0.0, 27.8), (5, 10, 23.7, 76.3), (834, 1000, 81.0, 85.6),
     (1, 1, 20.7, 100.0), (0, 1, 0.0, 79.3), (10, 100, 5.5, 17.4)],
)  # fmt: skip
def test_wilson_interval_has_its_textbook_values(hits: int, n: int, low: float, high: float) -> None:
    rate = Rate(hits, n)
    assert [round(100 * end, 1) for end in rate.interval()] == [low, high]
    assert str(rate) == f"{100 * hits / n:.1f} [{low:.1f}, {high:.1f}] n={n}"


def test_no_success_in_fifty_is_written_with_its_doubt() -> None:
    assert str(Rate(0, 50)) == "0.0 [0.0, 7.1] n=50"


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_solve_their_equation(pair: tuple[int, int]) -> None:
    """The ends are the p with (p̂ - p)² = z² p (1 - p) / n."""
    hits, n = pair
    low, high = Rate(hits, n).interval()
    assert 0 <= low <= hits / n <= high <= 1
    for p in (low, high):
        assert (hits / n - p) ** 2 == pytest.approx(Z95**2 * p * (1 - p) / n, rel=1e-6, abs=1e-12)


def test_a_rate_of_nothing_is_no_number() -> None:
    assert math.isnan(Rate(0, 0).value)
    assert Rate(0, 0).interval() == (0.0, 1.0)


def test_a_rate_of_nothing_can_still_be_written_as_json() -> None:
    json.dumps(Rate(0, 0).as_dict(), allow_nan=False)


def test_accuracy_counts_right_answers() -> None:
    batches = [(images_saying(1, 2, 3), torch.tensor([1, 2, 0])), (images_saying(4), torch.tensor([4]))]
    rate = clean_accuracy(Oracle(), batches)
    assert (rate.hits, rate.n) == (3, 4)


def test_attack_success_leaves_out_images_of_the_target_class() -> None:
    labels = torch.tensor([0, 0, 1, 2, 3])
    clean, stamped = images_saying(0, 0, 1, 2, 9), images_saying(0, 0, 0, 2, 5)
    (found,) = evaluate_models([Oracle()], [(clean, labels, stamped)], target=0)
    assert (found.accuracy.hits, found.accuracy.n) == (4, 5)
    assert found.attack_success == Rate(1, 3)  # of labels 1, 2, 3 only the first became 0
    assert found.robust_accuracy == Rate(1, 3)  # and only the second is still right


def test_target_images_alone_give_an_attack_rate_without_images() -> None:
    (found,) = evaluate_models([Oracle()], [(images_saying(0), torch.tensor([0]), images_saying(0))], target=0)
    assert found.attack_success == Rate(0, 0)


def test_a_trigger_without_target_is_refused() -> None:
    with pytest.raises(TriggerError):
        evaluate_models([Oracle()], [(images_saying(0), torch.tensor([0]), images_saying(0))])


def test_without_trigger_there_is_no_attack_rate() -> None:
    (found,) = evaluate_models([Oracle()], [(images_saying(0), torch.tensor([0]), None)], target=0)
    assert found.attack_success is found.robust_accuracy is None
    assert found.as_dict().keys() == {"accuracy"}


def test_several_models_at_once_equal_each_alone() -> None:
    models = [Oracle(), Oracle(1), randomize_batch_norm(Mixed())]
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(0, 4, (n, 3, 6, 6), generator=generator).float(), torch.arange(n) % 4,
         torch.randint(0, 4, (n, 3, 6, 6), generator=generator).float())
        for n in (7, 7, 3)
    ]  # fmt: skip
    together = evaluate_models(models, batches, target=2)
    assert together == [evaluate_models([model], batches, target=2)[0] for model in models]
    assert together[0].accuracy.n == 17


def test_what_was_lost_is_counted_image_by_image() -> None:
    labels = torch.tensor([1, 2, 3, 4, 5])
    before, after = evaluate_models(
        [Oracle(), Oracle(1)],
        [(images_saying(1, 2, 9), labels[:3], None), (images_saying(3, 5), labels[3:], None)],
    )
    assert accuracy_lost(before, after) == AccuracyLost(lost=3, gained=1, n=5)  # 1, 2 and 5 against 4
    assert accuracy_lost(before, before) == AccuracyLost(0, 0, 5)
    assert accuracy_lost(before, Evaluation(Rate(1, 2))) == AccuracyLost(0, 0, 0)  # of other images nothing is known


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n), st.floats(0, 1))))
def test_the_interval_of_what_was_lost_holds_it_and_turns_with_the_sign(drawn: tuple[int, int, float]) -> None:
    changed, n, part = drawn
    lost = round(changed * part)
    found, mirrored = AccuracyLost(lost, changed - lost, n), AccuracyLost(changed - lost, lost, n)
    low, high = found.interval()
    assert -1 <= low <= found.value + 1e-12 and found.value <= high + 1e-12 and high <= 1
    assert mirrored.interval() == pytest.approx((-high, -low))


@pytest.mark.parametrize(
    ("up", "down", "least"),
    [(0.05, 0.02, 0.94), (0.01, 0.01, 0.94), (0.3, 0.1, 0.94), (0.0, 0.04, 0.9)],  # the last: two images, one way
)
def test_the_interval_of_what_was_lost_covers_it_nineteen_times_in_twenty(up: float, down: float, least: float) -> None:
    """Summed over all outcomes of 60 images, of which each is lost or gained with these chances."""
    n, covered = 60, 0.0
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            ways = math.comb(n, lost) * math.comb(n - lost, gained)
            low, high = AccuracyLost(lost, gained, n).interval()
            if low <= up - down <= high:
                covered += ways * up**lost * down**gained * (1 - up - down) ** (n - lost - gained)
    assert covered >= least


def test_pairs_say_more_than_two_intervals() -> None:
    """Of 2000 images 40 are lost and 20 gained: one point, and surely some of it; the rates alone overlap."""
    low, high = AccuracyLost(40, 20, 2000).interval()
    assert 0 < low < 0.01 < high < 0.02
    assert Rate(1600, 2000).interval()[0] < Rate(1580, 2000).interval()[1]


def test_nothing_counted_is_no_number_and_can_be_written() -> None:
    assert math.isnan(AccuracyLost(0, 0, 0).value)
    json.dumps(AccuracyLost(0, 0, 0).as_dict(), allow_nan=False)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_changes_no_model(training: bool) -> None:
    model = randomize_batch_norm(Mixed()).train(training)
    before = snapshot(model)
    evaluate_models([model], [(torch.rand(4, 3, 8, 8), torch.zeros(4).long(), None)])
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    ("asr", "acc", "wanted"),
    [((100, 0), (90, 90), 1.0), ((100, 100), (90, 90), 0.5), ((100, 0), (90, 50), 0.8), ((0, 100), (90, 90), 0.5),
     ((100, 50), (50, 90), 0.75), ((0, 0), (100, 0), 0.0)],
)  # fmt: skip
def test_der_is_its_formula(asr: tuple[int, int], acc: tuple[int, int], wanted: float) -> None:
    before, after = (Evaluation(Rate(acc[k], 100), Rate(asr[k], 100), Rate(0, 100)) for k in (0, 1))
    assert der(before, after) == pytest.approx(wanted)


def test_der_needs_a_trigger() -> None:
    assert der(Evaluation(Rate(1, 2)), Evaluation(Rate(1, 2))) is None


def test_reports_are_in_percent() -> None:
    assert Rate(1, 3).as_dict() == {"percent": 33.33, "low": 6.15, "high": 79.23, "n": 3}
