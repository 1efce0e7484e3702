"""Scores, standardization, the threshold and its choice."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import randomize_batch_norm
from torch import Tensor

import bshub
from bshub.errors import InconclusiveError, UsageError
from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import find_pairs
from bshub.scoring.selection import MU_HIGH, MU_LOW, MU_STEP, choose_mu, flag, standardize
from bshub.scoring.statistics import PairStatistics, measure
from bshub.scoring.suspiciousness import SCORES, find_score
from bshub.settings import Settings

# What makes a filter more suspicious: score → statistic → sign
DIRECTIONS = {
    "tac": {"tac": +1},
    "bss": {"spectral": +1, "correlation": -1, "activation": -1, "saliency": -1},
    "clp": {"spectral": +1},
    "lipschitz": {"spectral": +1},
    "lone": {"spectral": +1, "correlation": -1},
    "dormant": {"spectral": +1, "activation": -1},
    "bn-shift": {"bn_shift": +1},
}
# Factors of a whole layer that must not change who is suspicious in it
FREE_SCALES = {
    "tac": ("tac",),
    "bss": ("spectral", "activation", "saliency"),
    "clp": ("spectral",),
    "lipschitz": ("spectral",),
    "lone": ("spectral",),
    "dormant": ("spectral", "activation"),
    "bn-shift": ("bn_shift",),
}


def some_statistics(n: int = 16, seed: int = 0) -> PairStatistics:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.rand(n, generator=generator) * 0.8 + 0.1

    return PairStatistics(draw(), draw(), draw(), draw(), draw(), tac=draw())


def test_every_score_is_covered_here_and_offered_by_the_command_line() -> None:
    from bshub_cli import _options

    assert SCORES.keys() == DIRECTIONS.keys() == FREE_SCALES.keys()
    assert Settings().score in SCORES
    text = _options.ScoreName.__metadata__[0].help
    assert set(text.partition(": ")[2].rstrip(".").split(", ")) == set(SCORES)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("size", [1, 2, 16])
def test_scores_are_finite_and_one_per_filter(name: str, size: int) -> None:
    scores = SCORES[name].function(some_statistics(size))
    assert scores.shape == (size,)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("name", SCORES)
def test_dead_filters_and_dead_layers_have_finite_scores(name: str) -> None:
    alive = some_statistics()
    for dead in ([0], list(range(16))):
        values = {key: value.clone() for key, value in vars(alive).items() if value is not None}
        for value in values.values():
            value[dead] = 0
        assert torch.isfinite(standardize(SCORES[name].function(PairStatistics(**values)))).all()


@pytest.mark.parametrize(("name", "term", "sign"), [(n, t, s) for n, d in DIRECTIONS.items() for t, s in d.items()])
def test_higher_means_more_suspicious_in_every_term(name: str, term: str, sign: int) -> None:
    statistics, function = some_statistics(), SCORES[name].function
    for o in range(16):
        raised = getattr(statistics, term).clone()
        raised[o] *= 1.2
        gain = function(replace(statistics, **{term: raised}))[o] - function(statistics)[o]
        assert float(gain) * sign > 0
        others = torch.arange(16) != o  # and the filter passes others, never falls behind them
        before, after = function(statistics), function(replace(statistics, **{term: raised}))
        assert int((after[others] > after[o]).sum()) * sign <= int((before[others] > before[o]).sum()) * sign


@pytest.mark.parametrize(("name", "term"), [(n, t) for n, terms in FREE_SCALES.items() for t in terms])
@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_the_scale_of_a_whole_layer_does_not_matter(name: str, term: str, factor: float) -> None:
    statistics, function = some_statistics(), SCORES[name].function
    scaled = replace(statistics, **{term: getattr(statistics, term) * factor})
    torch.testing.assert_close(standardize(function(scaled)), standardize(function(statistics)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name, score in SCORES.items() if not score.needs_images])
def test_a_scaled_convolution_behind_its_batch_norm_scores_the_same(name: str) -> None:
    """W → cW, μ → cμ, σ² → c²σ² is the same function: a score of the weights must not see it."""
    from little_nets import Mixed

    model = randomize_batch_norm(Mixed())
    model.bn1.eps = 1e-12
    flow, _ = follow_channels(model, (3, 8, 8))
    pairing = find_pairs(model, flow)
    before = SCORES[name].function(measure(model, pairing, None)["conv1"])
    with torch.no_grad():
        model.conv1.weight.mul_(30)
        model.bn1.running_mean.mul_(30)
        model.bn1.running_var.mul_(900)
    torch.testing.assert_close(SCORES[name].function(measure(model, pairing, None)["conv1"]), before)


@pytest.mark.parametrize("name", SCORES)
def test_scores_say_what_they_need(name: str) -> None:
    alone = PairStatistics(some_statistics().spectral)
    if SCORES[name].needs_images:
        with pytest.raises(UsageError, match="needs clean images"):
            SCORES[name].function(alone)
    else:
        assert torch.equal(SCORES[name].function(alone), SCORES[name].function(some_statistics()))


def test_an_unknown_score_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        find_score("bbs")
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in SCORES)


def test_standardize_gives_zero_mean_and_unit_deviation() -> None:
    z = standardize(torch.rand(64, generator=torch.Generator().manual_seed(0)) * 100 + 7)
    assert float(z.mean()) == pytest.approx(0, abs=1e-9)
    assert float(z.std(correction=0)) == pytest.approx(1)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e30, -3.3e-20])
def test_standardize_of_a_constant_layer_is_zero(value: float) -> None:
    assert standardize(torch.full((7,), value)).tolist() == [0.0] * 7


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_inconclusive(bad: float) -> None:
    with pytest.raises(InconclusiveError):
        standardize(torch.tensor([1.0, bad, 2.0]))


@given(st.floats(1e-3, 1e3), st.floats(-100, 100), st.integers(0, 1000))
def test_standardize_ignores_scale_and_shift(scale: float, shift: float, seed: int) -> None:
    scores = torch.rand(20, generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(standardize(scores * scale + shift), standardize(scores), rtol=1e-6, atol=1e-6)


def test_only_filters_with_a_batch_norm_above_mu_are_flagged() -> None:
    class Pair:
        name, paired = "conv", torch.tensor([True, True, False, True]).numpy()

    scores = {"conv": torch.tensor([3.0, 1.0, 9.0, 2.0], dtype=torch.float64)}
    assert flag([Pair()], scores, 2.0)["conv"].tolist() == [0]  # 2.0 itself is not above μ, filter 2 has none
    assert flag([Pair()], scores, 9.5) == {}


GRID = [MU_HIGH - MU_STEP * i for i in range(round((MU_HIGH - MU_LOW) / MU_STEP) + 1)]


@settings(deadline=None)
@given(st.floats(0, 6), st.floats(0, 20), st.floats(0.3, 1))
def test_choose_mu_finds_the_lowest_candidate_within_the_budget(border: float, budget: float, before: float) -> None:
    def accuracy_at(mu: float) -> tuple[int, float]:
        return int(100 * (7 - mu)), before if mu >= border else before - budget / 100 - 0.01

    chosen = choose_mu(accuracy_at, before, budget)
    assert chosen.mu == min(mu for mu in GRID if mu >= border)
    tried = {mu: (flagged, accuracy) for mu, flagged, accuracy in chosen.curve}
    assert list(tried) == sorted(tried, reverse=True)
    assert all(mu in GRID and tried[mu] == accuracy_at(mu) for mu in tried)
    assert len(tried) <= 9


def test_choose_mu_goes_to_the_end_when_pruning_costs_nothing() -> None:
    assert choose_mu(lambda mu: (5, 0.9), 0.9, 0.0).mu == MU_LOW


def test_exactly_the_budget_is_within_it() -> None:
    assert choose_mu(lambda mu: (5, 0.85), 0.9, 5.0).mu == MU_LOW


def test_when_every_candidate_costs_too_much_no_candidate_is_taken() -> None:
    chosen = choose_mu(lambda mu: (5, 0.1), 0.9, 5.0)
    assert chosen.mu > MU_HIGH
    assert "nothing is pruned" in chosen.reason
    assert chosen.curve == ((MU_HIGH, 5, 0.1),)


def test_nothing_is_pruned_means_nothing_is_flagged() -> None:
    class Pair:
        name, paired = "conv", torch.ones(128, dtype=torch.bool).numpy()

    scores = standardize(torch.cat([torch.zeros(127), torch.ones(1)]))  # one filter at 11 deviations
    chosen = choose_mu(lambda mu: (1, 0.1), 0.9, 5.0)
    assert flag([Pair()], {"conv": scores}, chosen.mu) == {}


def test_neither_scoring_nor_repair_nor_the_pipeline_can_see_a_trigger() -> None:
    """A defender has only those he inverts; whoever chose μ by a real one would report an oracle's figures."""
    inverted = ("bshub.scoring.inversion", "bshub.scoring.response")
    root = Path(inspect.getfile(bshub)).parent
    rooms = [*root.glob("scoring/*.py"), *root.glob("repair/*.py"), *root.glob("surgery/*.py")]
    for path in [*rooms, root / "diagnosis.py", root / "pipeline.py", root / "clean.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = getattr(node, "module", None) or ""
            names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
            assert "attack" not in imported, path
            assert not any("attack" in name for name in names), path
            assert imported in inverted or not any("rigger" in name for name in names), path


@pytest.mark.parametrize(
    "bad",
    [
        {"mu": float("nan")}, {"mu": float("inf")}, {"mu": "low"}, {"budget": float("nan")}, {"budget": -1.0},
        {"budget": 101.0}, {"finetune_epochs": -1}, {"finetune_epochs": 1.5}, {"finetune_lr": float("nan")},
        {"finetune_lr": 0.0}, {"finetune_lr": -1.0}, {"finetune_lr": float("inf")}, {"batch_size": 0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError):
        Settings(**bad)


@pytest.mark.parametrize("bad", [{"seed": 2**70}, {"budget": "5"}, {"finetune_lr": None}], ids=str)
def test_settings_of_the_wrong_kind_are_refused_too(bad: dict) -> None:
    with pytest.raises(UsageError):
        Settings(**bad)
