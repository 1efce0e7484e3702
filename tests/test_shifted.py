"""The second look: what batch norm remembers of the training images that the clean ones do not show."""

from __future__ import annotations

import copy

import pytest
import torch
from little_nets import same, snapshot
from test_inversion import Planted, clean_images
from torch import Tensor, nn

from bshub import sanitize
from bshub.scoring.selection import MU_NOTHING
from bshub.scoring.shifted import CHANCE, shifted_filters
from bshub.scoring.statistics import PairStatistics
from bshub.settings import Settings


def calibrated(remembers: int | None) -> nn.Module:
    """A sound net whose batch norm has seen images like the clean ones; one filter may remember others beside them."""
    model = Planted(backdoor=False)
    model.norm.reset_running_stats()
    model.norm.momentum = None  # the plain mean over what is seen
    model.train()
    with torch.no_grad():
        model(clean_images(copy.deepcopy(model).eval(), 2000, seed=9)[0])
        if remembers is not None:
            model.norm.running_mean[remembers] += 1.5 * model.norm.running_var[remembers].sqrt()
    return model.eval()


def statistics_of(shift: Tensor) -> dict[str, PairStatistics]:
    return {"conv": PairStatistics(spectral=torch.ones(len(shift)), bn_shift=shift)}


def test_chance_is_no_finding_and_what_lies_far_off_is() -> None:
    quiet = torch.full((50,), 0.001)
    loud = quiet.clone()
    loud[[3, 7]] = 0.3
    assert shifted_filters(statistics_of(quiet), 100)[0] == 0
    count, most, bound = shifted_filters(statistics_of(loud), 100)
    assert (count, most, bound) == (2, pytest.approx(0.3), pytest.approx(CHANCE / 132))


def test_few_images_excuse_more() -> None:
    shift = torch.full((50,), 0.001)
    shift[0] = 0.06
    assert shifted_filters(statistics_of(shift), 100)[0] == 1
    assert shifted_filters(statistics_of(shift), 10)[0] == 0


def test_images_of_another_kind_lie_off_everywhere_and_are_no_finding() -> None:
    assert shifted_filters(statistics_of(torch.rand(50) + 0.1), 100)[0] == 0
    assert shifted_filters({"conv": PairStatistics(spectral=torch.ones(2))}, 100)[0] == 0


def test_what_only_batch_norm_remembers_is_judged_by_it_and_said() -> None:
    model = calibrated(remembers=5)
    result = sanitize(model, batches_of(model), Settings(device="cpu"))
    assert result.diagnosis.shortcut is not None and not result.diagnosis.shortcut.triggers
    assert result.diagnosis.score == "bn-shift" and result.plan.flagged == {"conv": [5]}
    assert any("missing in the clean ones" in warning for warning in result.report["warnings"])


def test_the_second_look_and_useless_filters_go_together() -> None:
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
