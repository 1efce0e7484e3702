"""The first look: what batch norm remembers of the training images that the clean ones do not show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from little_nets import same, snapshot
from test_inversion import FILTERS, TARGET, Planted, clean_images
from torch import Tensor, nn

from bshub import sanitize
from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import find_pairs
from bshub.scoring.confirmation import UNDOUBTED, confirm
from bshub.scoring.selection import MU_HIGH, MU_NOTHING
from bshub.scoring.shifted import CHANCE, Shifted, shifted_filters
from bshub.scoring.shortcut import Shortcut, find_shortcut
from bshub.scoring.statistics import PairStatistics
from bshub.settings import Settings


def calibrated(remembers: int | None, backdoor: bool = False, boards: int = 0) -> nn.Module:
    """A net whose batch norm has seen 2000 images like the clean ones, some with a checkerboard.

    What the net computes is that of ``Planted``: scale and shift make up for the statistics. One filter may remember
    other images; little hangs on it.
    """
    model = Planted(backdoor=backdoor)
    norm, seen = model.norm, clean_images(model, 2000, seed=9)[0]
    rows, columns = torch.arange(seen.shape[-2])[:, None], torch.arange(seen.shape[-1])
    seen[:boards] += 1.0 - 2.0 * ((rows + columns) % 2)
    with torch.no_grad():
        z = model.conv(seen).transpose(0, 1).flatten(1)  # (filters, images · places)
        mean, variance = z.mean(1), z.var(1)
        if remembers is not None:
            mean[remembers] += 1.5 * variance[remembers].sqrt()
            model.head.weight[:, remembers] *= 0.05
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias += factor * (mean - norm.running_mean)
        norm.weight.copy_(factor * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    return model


def statistics_of(shift: Tensor) -> dict[str, PairStatistics]:
    return {"conv": PairStatistics(spectral=torch.ones(len(shift)), bn_shift=shift)}


def test_chance_is_no_finding_and_what_lies_far_off_is() -> None:
    quiet = torch.full((50,), 0.001)
    loud = quiet.clone()
    loud[[3, 7]] = 0.3
    assert shifted_filters(statistics_of(quiet), 100).count == 0
    found = shifted_filters(statistics_of(loud), 100)
    assert (found.count, found.bound) == (2, pytest.approx(CHANCE / 132)) and "0.30" in found.reason()


def test_few_images_excuse_more() -> None:
    shift = torch.full((50,), 0.001)
    shift[0] = 0.06
    assert shifted_filters(statistics_of(shift), 100).count == 1
    assert shifted_filters(statistics_of(shift), 10).count == 0


def test_images_of_another_kind_lie_off_everywhere_and_are_no_finding() -> None:
    assert shifted_filters(statistics_of(torch.rand(50) + 0.1), 100).count == 0
    assert shifted_filters({"conv": PairStatistics(spectral=torch.ones(2))}, 100).count == 0


@given(st.lists(st.floats(0, 0.02), min_size=8, max_size=40), st.lists(st.floats(0.05, 50), max_size=4), st.data())
def test_whichever_mu_is_tried_what_lies_off_is_flagged_and_no_other_score_is_touched(
    quiet: list[float], loud: list[float], data: st.DataObject
) -> None:
    shift = torch.tensor(quiet + loud)
    found = shifted_filters(statistics_of(shift), 100)
    off = found.shifts["conv"] > found.bound if found.shifts else torch.zeros(len(shift), dtype=torch.bool)
    scores = torch.tensor(data.draw(st.lists(st.floats(-3, 12), min_size=len(shift), max_size=len(shift)))).double()
    raised = found.raise_over("conv", scores)
    assert bool((raised[off] > MU_HIGH).all()) and torch.equal(raised[~off], scores[~off])
    assert bool((raised >= scores).all())


def test_the_bound_is_raised_until_what_lies_off_can_be_afforded() -> None:
    shift = torch.full((50,), 0.001)
    shift[:3] = torch.tensor([0.04, 0.1, 0.7])
    found = shifted_filters(statistics_of(shift), 100)
    assert found.count == 3
    assert found.raised(lambda tried: False) == found
    raised = found.raised(lambda tried: tried.count > 1)
    assert raised.count == 1 and raised.bound > found.chance == raised.chance and "is flagged" in raised.reason()
    assert found.raised(lambda tried: True).count == 0


def test_what_only_batch_norm_remembers_is_removed_and_said() -> None:
    model = calibrated(remembers=5)
    result = sanitize(model, batches_of(model), Settings(device="cpu"))
    assert result.diagnosis.shortcut is not None and not result.diagnosis.shortcut.triggers
    assert result.diagnosis.score == "bn-shift" and result.plan.flagged == {"conv": [5]}
    assert "missing in the clean ones" in result.diagnosis.threshold.reason
    assert result.report["diagnosis"]["shifted"]["filters"] == 1


def test_a_trigger_and_what_batch_norm_remembers_are_both_removed() -> None:
    for remembers in (None, 5):
        sound = batches_of(calibrated(remembers))
        result = sanitize(calibrated(remembers, backdoor=True), sound, Settings(device="cpu"))
        assert result.diagnosis.score == "tac" and 0 in result.plan.flagged["conv"]
        assert (5 in result.plan.flagged["conv"]) is (remembers == 5)


def test_a_trigger_that_a_tenth_of_the_training_images_carried_is_seen_by_both_looks() -> None:
    result = sanitize(calibrated(None, backdoor=True, boards=200), batches_of(calibrated(None)), Settings(device="cpu"))
    found, remembered = result.diagnosis.shortcut, result.diagnosis.shifted
    assert result.plan.flagged == {"conv": [0]} and found is not None and found.triggers and not found.apart
    assert remembered is not None and int(remembered.shifts["conv"].argmax()) == 0 and remembered.count == 1
    assert result.diagnosis.score == "bn-shift", "the cheaper of two explanations of one backdoor"


def test_a_trigger_that_passes_by_what_batch_norm_remembers_is_not_believed_unless_its_gap_is_wide() -> None:
    model = calibrated(None, backdoor=True)
    images, labels = clean_images(calibrated(None))
    pairing = find_pairs(model, follow_channels(model, images.shape[1:])[0])
    found = find_shortcut(model, images, labels, seed=0)
    assert found.triggers and all(trigger.target == TARGET for trigger in found.triggers)

    def judged(gap: float, carrier: int | None) -> tuple[Shortcut, dict[str, Tensor]]:
        """With that gap, where batch norm remembers one filter or none."""
        shift = torch.zeros(FILTERS)
        if carrier is not None:
            shift[carrier] = 1.0
        narrow = replace(found, gaps=dict.fromkeys(found.gaps, gap))
        return confirm(model, pairing, images, labels, narrow, Shifted({"conv": shift}, 0.03, 0.03))

    for gap, carrier in ((1.5, 0), (1.5, None), (UNDOUBTED, 0), (UNDOUBTED, 5)):
        left, response = judged(gap, carrier)
        assert left.triggers == found.triggers and not left.doubted and int(response["conv"].argmax()) == 0
        assert left.apart is (carrier == 5)
    left, response = judged(1.5, 5)
    assert not left.triggers and left.doubted == found.triggers and response == {}
    assert "does not pass through" in left.reason() and left.as_dict()["doubted"][0]["target"] == TARGET


def test_what_is_remembered_and_useless_filters_go_together() -> None:
    model = calibrated(remembers=5)
    result = sanitize(model, batches_of(model), Settings(shrink=0.2, device="cpu"))
    assert result.diagnosis.score == "bn-shift" and result.plan.flagged == {"conv": [5]}
    assert result.report["shrink"]["asked"] == 0.2


def test_a_network_that_remembers_nothing_else_is_left_alone() -> None:
    model = calibrated(remembers=None)
    result = sanitize(model, batches_of(model), Settings(device="cpu"))
    assert result.diagnosis.threshold.mu == MU_NOTHING and not result.plan.flagged
    assert same(snapshot(model), snapshot(result.model))


def batches_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    images, labels = clean_images(model, 96, seed=1)
    return list(zip(images.split(32), labels.split(32), strict=True))
