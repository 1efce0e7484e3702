"""Every attack poisons what its paper says it poisons, with the trigger that its paper's equation describes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from little_nets import Residual
from torch import Tensor, nn

from bshub.errors import UsageError
from bshub.evaluation.attacks import label_consistent as lc
from bshub.evaluation.attacks.adaptive import triggered_change
from bshub.evaluation.attacks.badnets import badnets
from bshub.evaluation.attacks.blended import noise, picture
from bshub.evaluation.attacks.generator import make_networks, mask_of, mix, pattern_of
from bshub.evaluation.attacks.input_aware import diversity_loss
from bshub.evaluation.attacks.interface import CLEAN, CROSS, POISONED, Setup
from bshub.evaluation.attacks.penalties import (
    DEFENDER,
    PENALTIES,
    View,
    against_default,
    against_weights,
    norm_scale,
    spectral_bound,
)
from bshub.evaluation.attacks.registry import ATTACKS, find_attack
from bshub.evaluation.attacks.warp import control_grid, identity_field, noisy_field, warp, warp_field
from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import find_pairs
from bshub.progress import Steps
from bshub.scoring.response import activated_change
from bshub.scoring.selection import standardize
from bshub.scoring.shifted import shifted_filters
from bshub.scoring.statistics import measure
from bshub.scoring.stream import SHRINK
from bshub.scoring.suspiciousness import lipschitz

N, SIZE = 200, (16, 20)
IMAGES = torch.randint(0, 256, (N, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % 5
CLEAN_LABEL = ("sig", "label-consistent")
DIRTY = ("badnets", "blended", "blended-noise", "adaptive")
REDRAWN = ("wanet", "input-aware")


class Brightness(nn.Module):
    """Five classes by mean brightness and contrast: differentiable, fixed, needs no training."""

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = x.mean((1, 2, 3)), x.std((1, 2, 3))
        return torch.stack([mean * k + spread * (k % 2) for k in range(5)], 1)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return make(tmp_path)


def make(folder: Path, rate: float = 0.1, seed: int = 0, **other: Any) -> Setup:
    fields: dict[str, Any] = {
        "labels": LABELS, "read": lambda index: IMAGES[index], "size": SIZE, "target": 2, "rate": rate, "seed": seed,
        "normalise": lambda pixels: (pixels - 0.5) / 0.25, "device": torch.device("cpu"),
        "folder": folder / f"{seed}", "surrogate": Brightness, "steps": Steps(),
    }  # fmt: skip
    return Setup(**{**fields, **other})


def options(name: str) -> dict[str, Any]:
    return {"mask_steps": 3, "channels": (4, 8)} if name == "input-aware" else {}


def attack_of(name: str, setup: Setup) -> Any:
    return find_attack(name, options(name))(setup)


def poisoned_by(attack: Any, setup: Setup, epoch: int = 0) -> tuple[Tensor, Tensor]:
    """What stands before the augmentation: images and roles of the whole set."""
    roles = attack.roles(epoch)
    index = torch.arange(N)
    return attack.stamp(setup.read(index), roles, index, torch.Generator().manual_seed(1)), roles


@pytest.mark.parametrize("rate", [0.005, 0.1, 0.15])
@pytest.mark.parametrize("name", [*DIRTY, *REDRAWN])
def test_the_rate_is_a_share_of_the_whole_training_set(tmp_path: Path, name: str, rate: float) -> None:
    roles = attack_of(name, make(tmp_path, rate)).roles(0)
    assert (roles == POISONED).sum() == max(1, round(rate * N))


@pytest.mark.parametrize("name", DIRTY)
def test_dirty_label_attacks_poison_other_classes_only(setup: Setup, name: str) -> None:
    attack = attack_of(name, setup)
    assert not attack.redrawn
    assert (LABELS[attack.roles(0) == POISONED] != setup.target).all()
    assert torch.equal(attack.roles(0), attack.roles(3))


@pytest.mark.parametrize("name", CLEAN_LABEL)
def test_clean_label_attacks_never_change_a_label_and_stop_at_the_class_size(tmp_path: Path, name: str) -> None:
    few, all_of_it = (attack_of(name, make(tmp_path, rate, seed)).roles(0) for seed, rate in enumerate((0.1, 0.9)))
    assert (LABELS[few == POISONED] == 2).all()
    assert (few == POISONED).sum() == 20
    assert torch.equal(all_of_it == POISONED, LABELS == 2)


@pytest.mark.parametrize("name", REDRAWN)
def test_attackers_who_control_the_training_poison_other_images_each_epoch(setup: Setup, name: str) -> None:
    attack = attack_of(name, setup)
    assert attack.redrawn
    first, second = attack.roles(0), attack.roles(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, attack.roles(0))
    assert (first == CROSS).sum() == (second == CROSS).sum() == 20 * (2 if name == "wanet" else 1)


@pytest.mark.parametrize("name", [*DIRTY, "wanet", "sig"])
def test_poisoned_images_carry_the_trigger_and_the_others_are_untouched(setup: Setup, name: str) -> None:
    attack = attack_of(name, setup)
    images, roles = poisoned_by(attack, setup)
    trigger = attack.trigger()
    assert (trigger.target, trigger.size) == (2, SIZE)
    assert torch.equal(images[roles == POISONED], trigger(IMAGES[roles == POISONED]))
    assert torch.equal(images[roles == CLEAN], IMAGES[roles == CLEAN])
    assert not torch.equal(images[roles == POISONED], IMAGES[roles == POISONED])


@pytest.mark.parametrize("name", sorted({*ATTACKS} - {"none"}))
def test_a_seed_gives_one_attack_and_another_seed_another(tmp_path: Path, name: str) -> None:
    drawn = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        setup = make(tmp_path / folder, seed=seed)
        attack = attack_of(name, setup)
        drawn.append((attack.roles(0), attack.trigger()(IMAGES[:4])))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_no_attack_poisons_nothing_and_has_no_trigger(setup: Setup) -> None:
    attack = attack_of("none", setup)
    assert (attack.roles(0) == CLEAN).all()
    assert attack.trigger() is None


def test_badnets_patch_is_three_cells_wide_in_the_corner_at_any_canvas(tmp_path: Path) -> None:
    for size, cell in (((32, 32), 1), ((224, 256), 7), (SIZE, 1)):
        trigger = attack_of("badnets", make(tmp_path, size=size)).trigger()
        grey = torch.full((1, 3, *size), 100, dtype=torch.uint8)
        rows, columns = (trigger(grey)[0, 0] != 100).nonzero().unbind(1)
        assert rows.max() == size[0] - cell - 1
        assert columns.max() == size[1] - cell - 1
        assert len(rows) == (3 * cell) ** 2


def test_badnets_white_square_covers_what_the_checker_covers(setup: Setup) -> None:
    grey = torch.full((1, 3, *SIZE), 100, dtype=torch.uint8)
    checker, white = (badnets(setup, pattern=name).trigger()(grey) for name in ("checker", "white"))
    assert torch.equal(checker != 100, white != 100)
    assert set(white[white != 100].tolist()) == {255}
    with pytest.raises(UsageError, match="unknown pattern") as caught:
        badnets(setup, pattern="whit")
    assert "did you mean white" in caught.value.hint


def test_blended_patterns_are_a_smooth_picture_or_plain_noise(setup: Setup) -> None:
    drawing, grains = (draw((64, 64), setup.generator(2)).float() for draw in (picture, noise))
    rough = [float((image[:, 1:] - image[:, :-1]).abs().mean() / image.std()) for image in (drawing, grains)]
    assert rough[0] < 0.15 < 1 < rough[1]
    assert drawing.std() > 20
    small = picture((32, 32), setup.generator(2)).float()
    assert (torch.nn.functional.avg_pool2d(drawing, 2) - small).abs().mean() < 8  # the same drawing at every size


def test_sig_adds_the_papers_sinusoid_along_the_columns(setup: Setup) -> None:
    stamped = attack_of("sig", setup).trigger()(IMAGES).numpy().astype(float)
    wave = np.array([20 * math.sin(2 * math.pi * j * 6 / SIZE[1]) for j in range(1, SIZE[1] + 1)])
    wanted = np.clip(IMAGES.numpy() + wave, 0, 255)
    assert np.abs(stamped - wanted).max() <= 0.5 + 1e-3


def test_the_control_grid_has_mean_displacement_one_and_the_field_stays_in_the_image() -> None:
    grid = control_grid(4, torch.Generator().manual_seed(0))
    assert float(grid.abs().mean()) == pytest.approx(1)
    field = warp_field(grid, 0.5, 1.0, (32, 32))
    assert field.abs().max() <= 1
    moved = (field - identity_field((32, 32))).abs() * 31 / 2  # in pixels
    assert 0.05 < float(moved.mean()) < 0.5
    assert torch.equal(warp_field(grid, 0.0, 1.0, (8, 12)), identity_field((8, 12)).clamp(-1, 1))
    noisy = noisy_field(field, 3, torch.Generator().manual_seed(1))
    assert float((noisy - field).abs().max()) <= 1 / 32 + 1e-6
    assert not torch.equal(noisy[0], noisy[1])


def test_a_warp_by_a_whole_pixel_shifts_the_image() -> None:
    field = identity_field((8, 8))
    field[..., 0] += 2 / 7  # x one pixel to the right
    images = IMAGES[:, :, :8, :8].float()
    assert torch.allclose(warp(images, field)[..., :7], images[..., 1:], atol=1e-2)


def test_wanets_noise_mode_keeps_the_label_and_warps_each_image_in_its_own_way(setup: Setup) -> None:
    attack = attack_of("wanet", setup)
    images, roles = poisoned_by(attack, setup)
    cross = roles == CROSS
    assert not torch.equal(images[cross], attack.trigger()(IMAGES[cross]))
    assert (images[cross].float() - IMAGES[cross].float()).abs().mean() > 1
    with pytest.raises(UsageError, match="more than"):
        attack_of("wanet", make(setup.folder, rate=0.5))


def test_label_consistent_stays_within_epsilon_under_the_patches_and_makes_the_class_harder(setup: Setup) -> None:
    attack = attack_of("label-consistent", setup)
    images, roles = poisoned_by(attack, setup)
    hit = roles == POISONED
    change = images[hit].int() - IMAGES[hit].int()
    corners = torch.zeros(SIZE, dtype=torch.bool)
    for rows in (slice(0, 3), slice(-3, None)):
        for columns in (slice(0, 3), slice(-3, None)):
            corners[rows, columns] = True
    assert change[..., ~corners].abs().max() <= 16
    assert torch.equal(images[hit][..., corners], attack.trigger()(IMAGES[hit])[..., corners])
    stamped = attack.trigger()(IMAGES)
    assert torch.equal(stamped[..., ~corners], IMAGES[..., ~corners])
    assert torch.equal(stamped[..., corners].flip(0), stamped.flip(0)[..., corners])
    hard = lc.harden(Brightness(), IMAGES[:8], torch.full((8,), 2), setup, 16.0, 10, 2.0)

    def loss(x: Tensor) -> float:
        logits = Brightness()(setup.normalise(x.float() / 255))
        return float(nn.functional.cross_entropy(logits, torch.full((8,), 2)))

    assert loss(hard) > loss(IMAGES[:8])
    flipped = attack.trigger()(IMAGES.flip(3)).flip(3)
    assert torch.equal(flipped, attack.trigger()(IMAGES))  # a flip as augmentation leaves the trigger as it is


def test_the_generators_trigger_is_bounded_and_another_for_each_image(setup: Setup) -> None:
    torch.manual_seed(0)
    networks = make_networks((4, 8)).eval()
    pixels = IMAGES[:6].float() / 255
    with torch.no_grad():
        pattern, mask = pattern_of(networks, pixels), mask_of(networks, pixels)
    assert pattern.shape == (6, 3, *SIZE)
    assert mask.shape == (6, 1, *SIZE)
    for drawn in (pattern, mask):
        assert drawn.min() >= 0
        assert drawn.max() <= 1
    assert torch.equal(mix(pixels, pattern, torch.zeros_like(mask)), pixels)
    assert torch.allclose(mix(pixels, pattern, torch.ones_like(mask)), pattern, atol=1e-6)
    assert (pattern[0] - pattern[1]).abs().max() > 0


def test_the_diversity_loss_punishes_one_trigger_for_all() -> None:
    x, y = IMAGES[:8].float() / 255, IMAGES[8:16].float() / 255
    alike, apart = torch.zeros(8, 3, *SIZE), torch.rand(8, 3, *SIZE)
    assert diversity_loss(x, y, alike, apart) < diversity_loss(x, y, alike, alike + 0.01)
    assert float(diversity_loss(x, y, x, y)) == pytest.approx(1, abs=1e-4)
    near = alike.clone().requires_grad_(True)
    diversity_loss(x, y, near, alike).backward()
    assert torch.isfinite(near.grad).all()


def test_input_aware_learns_the_pattern_and_leaves_the_mask_frozen(setup: Setup) -> None:
    attack = attack_of("input-aware", setup)
    roles = attack.roles(0)
    index = torch.cat([(roles == role).nonzero().squeeze(1)[:6] for role in (CLEAN, POISONED, CROSS)])
    pixels = IMAGES[index].float() / 255
    result, extra = attack.live(pixels, roles[index], torch.Generator().manual_seed(0))
    assert torch.equal(result[:6], pixels[:6])
    assert not torch.equal(result[6:12], pixels[6:12])
    assert not torch.equal(result[12:], pixels[12:])
    (result.square().mean() + extra).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attack.learned["pattern"].last.parameters())
    assert all(p.grad is None for p in attack.learned["mask"].parameters())
    once = attack.trigger()(IMAGES[:8])
    assert torch.equal(once[3:4], attack.trigger()(IMAGES[3:4]))  # of an image alone, whatever the batch
    assert not torch.equal(attack.cross(IMAGES[:8]), once)


def test_the_masks_of_an_earlier_start_are_used_again(tmp_path: Path) -> None:
    first, second = (attack_of("input-aware", make(tmp_path)) for _ in range(2))
    assert torch.equal(first.trigger()(IMAGES[:4]), second.trigger()(IMAGES[:4]))
    assert len(list((tmp_path / "0").glob("*.safetensors"))) == 1


def view_of(model: nn.Module, channels: dict[str, Tensor] | None = None) -> View:
    """Forty pictures and the same with a bright corner; all channels count as triggered unless told otherwise."""
    flow, _ = follow_channels(model, (3, 16, 16))
    pairs = find_pairs(model, flow).pairs
    clean = (IMAGES[:40, :, :, :16].float() / 255 - 0.5) / 0.25
    stamped = clean.clone()
    stamped[:, :, -4:, -4:] = 2.0
    return View(model, pairs, channels or {p.name: torch.arange(p.out_channels) for p in pairs}, clean, stamped)


def test_the_adaptive_penalty_on_the_weights_is_the_score_that_a_defender_sees(trained: nn.Module) -> None:
    view = view_of(trained)
    flow, _ = follow_channels(trained, (3, 16, 16))
    statistics = measure(trained, find_pairs(trained, flow), None)
    total = []
    for pair in view.pairs:
        ours = spectral_bound(trained, pair).detach()
        assert torch.allclose(ours, statistics[pair.name].spectral, rtol=1e-3, atol=1e-5)
        total.append(standardize(lipschitz(statistics[pair.name])).relu())
    assert float(against_weights(view)) == pytest.approx(float(torch.cat(total).mean()), rel=1e-3)


def test_the_adaptive_penalty_on_the_default_is_what_a_defender_with_the_trigger_sees(trained: nn.Module) -> None:
    view = view_of(trained)
    flow, _ = follow_channels(trained, (3, 16, 16))
    pairing = find_pairs(trained, flow)
    answers = activated_change(trained, pairing, view.clean, view.stamped)
    z = torch.cat([standardize(change).relu() for change in answers.values()])
    labels = torch.zeros(40, dtype=torch.long)
    found = shifted_filters(measure(trained, pairing, [(view.clean, labels)]), DEFENDER)
    statistics = measure(trained, pairing, [(view.clean, labels)])
    kl = torch.cat([values.bn_shift for values in statistics.values() if values.bn_shift is not None])
    kl = kl * (40 + SHRINK) / 40 * DEFENDER / (DEFENDER + SHRINK)  # of a defender with more images
    expected = float(z.mean()) + float((kl / found.chance).log1p().mean())
    assert float(against_default(view)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("score", PENALTIES)
def test_descending_the_adaptive_penalty_hides_the_chosen_channels(score: str) -> None:
    torch.manual_seed(1)
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    view = view_of(model)
    changes = triggered_change(model, view.pairs, view.clean, view.stamped)
    if score == "lipschitz":
        changes = {pair.name: spectral_bound(model, pair) for pair in view.pairs}
    view = view_of(model, {name: change.topk(2).indices for name, change in changes.items()})
    penalty = PENALTIES[score]
    before = float(penalty(view))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 if score == "lipschitz" else 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        penalty(view).backward()
        optimizer.step()
    assert before > 0.5
    assert float(penalty(view)) < 0.3 * before
    assert not any(module.training != model.training for module in model.modules())


def test_the_triggered_change_names_the_channel_that_sees_the_trigger() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[2, 0, 1, 1] = 1.0
        model(torch.zeros(1, 3, *SIZE))
    flow, _ = follow_channels(model, (3, *SIZE))
    pairs = find_pairs(model, flow).pairs
    clean = torch.zeros(2, 3, *SIZE)
    stamped = clean.clone()
    stamped[:, 0, 3, 3] = 1.0
    change = triggered_change(model, pairs, clean, stamped)["0"]
    assert change[2] == pytest.approx(float(norm_scale(model, pairs[0])[2]) / math.prod(SIZE), rel=1e-4)
    assert change.argmax() == 2
    assert change[[0, 1, 3]].abs().max() == 0


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("nothing", {}), ("badnets", {"alpha": 0.1}), ("blended", {"alpha": "much"}), ("wanet", {"k": 4.5}),
        ("input-aware", {"channels": [1.5]}), ("blended", {"alpha": True}),
    ],
)  # fmt: skip
def test_unknown_attacks_and_options_are_refused(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        find_attack(name, given)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("blended", {"alpha": 0}), ("blended", {"pattern": "cat"}), ("wanet", {"k": 1}), ("wanet", {"s": -1.0}),
        ("sig", {"delta": 300}), ("sig", {"frequency": 100.0}), ("label-consistent", {"epsilon": -1}),
        ("input-aware", {"density": 2.0}), ("adaptive", {"share": 0.0}), ("adaptive", {"score": "tic"}),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(setup: Setup, name: str, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        find_attack(name, given)(setup)


def test_a_clean_label_attack_on_a_class_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no training image"):
        attack_of("sig", make(tmp_path, target=7))
