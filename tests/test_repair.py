"""Repairs: what must stay stays, what is random is seeded, and accuracy comes back."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from little_nets import coloured_images, same, snapshot
from torch import nn

from bshub.augment import SHIFT, augment
from bshub.errors import UsageError
from bshub.evaluation.metrics import clean_accuracy
from bshub.repair.finetune import REPAIRS, Schedule, cross_entropy, distil, repair

ZEROED = {"conv1.weight": [1, 5], "bn1.weight": [1, 5], "bn1.bias": [1, 5], "conv2.weight": [0], "bn2.running_mean": []}
SHORT = Schedule(epochs=3, lr=0.01, batch_size=16, seed=7)


@pytest.fixture
def pruned(trained: nn.Module) -> nn.Module:
    small = copy.deepcopy(trained)
    with torch.no_grad():
        for name, rows in ZEROED.items():
            if rows:
                small.get_parameter(name)[rows] = 0
    return small


def run(model: nn.Module, teacher: nn.Module, method: str = "distil", schedule: Schedule = SHORT) -> float:
    images, labels = coloured_images(40, seed=99)
    return repair(model, teacher, images, labels, ZEROED, method, schedule)


@pytest.mark.parametrize("method", REPAIRS)
def test_silenced_rows_stay_exactly_zero_while_the_rest_learns(
    trained: nn.Module, pruned: nn.Module, method: str
) -> None:
    before = copy.deepcopy(pruned.state_dict())
    run(pruned, trained, method)
    for name, rows in ZEROED.items():
        if rows:
            assert not pruned.get_parameter(name)[rows].any(), name
    assert all(not torch.equal(before[name], parameter) for name, parameter in pruned.named_parameters())


@pytest.mark.parametrize("method", REPAIRS)
def test_batch_norm_statistics_modes_and_flags_stay(trained: nn.Module, pruned: nn.Module, method: str) -> None:
    pruned.train()
    pruned.bn2.eval()
    pruned.fc.weight.requires_grad_(False)
    before = snapshot(pruned)
    run(pruned, trained, method)
    after = snapshot(pruned)
    for name, buffer in pruned.named_buffers():
        assert torch.equal(buffer, before["state"][name]), name
    assert (after["modes"], after["flags"]) == (before["modes"], before["flags"])


@pytest.mark.parametrize("method", REPAIRS)
def test_the_teacher_is_not_changed(trained: nn.Module, pruned: nn.Module, method: str) -> None:
    teacher = copy.deepcopy(trained).train()
    before = snapshot(teacher)
    run(pruned, teacher, method)
    assert same(before, snapshot(teacher))


@pytest.mark.parametrize("method", REPAIRS)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    trained: nn.Module, pruned: nn.Module, method: str
) -> None:
    models = [copy.deepcopy(pruned) for _ in range(3)]
    torch.manual_seed(0)
    first = run(models[0], trained, method)
    torch.manual_seed(1)  # the global generator has no say
    second = run(models[1], trained, method)
    run(models[2], trained, method, Schedule(3, 0.01, 16, seed=8))
    assert first == second
    assert same(snapshot(models[0]), snapshot(models[1]))
    assert not torch.equal(models[0].conv2.weight, models[2].conv2.weight)


def test_the_global_generator_is_left_alone(trained: nn.Module, pruned: nn.Module) -> None:
    state = torch.get_rng_state()
    run(pruned, trained)
    assert torch.equal(torch.get_rng_state(), state)


def test_distilling_an_unpruned_model_has_nothing_to_teach(trained: nn.Module) -> None:
    student = copy.deepcopy(trained)
    images, labels = coloured_images(40, seed=99)
    loss = repair(student, trained, images, labels, {}, "distil", SHORT)
    assert abs(loss) < 1e-6
    torch.testing.assert_close(student(images), trained(images), rtol=0.01, atol=0.01)


def test_distil_is_the_kl_divergence_of_the_answers() -> None:
    logits, teacher = torch.randn(5, 4), torch.randn(5, 4)
    p, q = teacher.softmax(1), logits.softmax(1)
    wanted = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distil(logits, torch.zeros(5).long(), teacher), wanted)
    assert float(distil(teacher, torch.zeros(5).long(), teacher)) == pytest.approx(0, abs=1e-7)


def test_finetune_is_the_cross_entropy_of_the_labels() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    wanted = -logits.log_softmax(1)[torch.arange(5), labels].mean()
    torch.testing.assert_close(cross_entropy(logits, labels, torch.empty(0)), wanted)


def test_repair_brings_accuracy_back(trained: nn.Module) -> None:
    hurt = copy.deepcopy(trained)
    with torch.no_grad():
        hurt.conv1.weight[:6] = 0
        hurt.bn1.weight[:6] = 0
        hurt.bn1.bias[:6] = 0
    zeroed = {name: list(range(6)) for name in ("conv1.weight", "bn1.weight", "bn1.bias")}
    test, images = coloured_images(150, seed=500), coloured_images(40, seed=99)
    before = clean_accuracy(hurt, [test]).value
    repair(hurt, trained, *images, zeroed, "distil", Schedule(20, 0.01, 16, 0))
    assert before < clean_accuracy(trained, [test]).value
    assert clean_accuracy(hurt, [test]).value > before


def test_no_epochs_change_nothing(trained: nn.Module, pruned: nn.Module) -> None:
    before = snapshot(pruned)
    assert math.isnan(run(pruned, trained, schedule=Schedule(0, 0.01, 16, 0)))
    assert same(before, snapshot(pruned))


def test_an_unknown_repair_is_refused_before_anything_changes(trained: nn.Module, pruned: nn.Module) -> None:
    before = snapshot(pruned)
    with pytest.raises(UsageError) as caught:
        run(pruned, trained, "nad")
    assert caught.value.hint == f"one of {', '.join(REPAIRS)}"
    assert same(before, snapshot(pruned))


def test_progress_hears_every_epoch(trained: nn.Module, pruned: nn.Module) -> None:
    seen: list[int] = []
    repair(pruned, trained, *coloured_images(40), ZEROED, "distil", SHORT, progress=seen.append)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize(("batch", "n"), [(16, 40), (64, 40), (1, 4)])
def test_any_batch_size_works(trained: nn.Module, pruned: nn.Module, batch: int, n: int) -> None:
    loss = repair(pruned, trained, *coloured_images(n), ZEROED, "distil", Schedule(1, 0.001, batch, 0))
    assert math.isfinite(loss)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (7, 3, 33, 20), (2, 1, 2, 2), (4, 3, 64, 64)])
def test_augment_keeps_shape_and_range_and_its_input(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    before = images.clone()
    result = augment(images, torch.Generator().manual_seed(0))
    assert result.shape == images.shape
    assert result.dtype == images.dtype
    assert images.min() <= result.min() <= result.max() <= images.max()
    assert torch.equal(images, before)


def test_augment_is_seeded_and_moves_by_no_more_than_a_sixteenth() -> None:
    images = torch.arange(64.0).expand(50, 1, 64, 64)  # the value is the column
    first, second = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(4)))
    middle = first[:, 0, 0, 32]  # column 32 shows column 32 ± reach, or its mirror image
    shifts = torch.minimum((middle - 32).abs(), (middle - 31).abs())
    assert shifts.max() <= 64 * SHIFT
    rising = first[:, 0, 0, 33] > first[:, 0, 0, 32]
    assert 10 < int(rising.sum()) < 40  # about half are flipped


@pytest.mark.parametrize(("images", "epochs"), [(4, 1), (4, 10), (12, 10), (33, 1)])
def test_a_few_images_and_a_few_epochs_are_enough(images: int, epochs: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
    batch, labels = torch.randn(images, 3, 8, 8), torch.arange(images) % 3
    schedule = Schedule(epochs=epochs, lr=0.002, batch_size=32, seed=0)
    assert math.isfinite(repair(model, copy.deepcopy(model), batch, labels, {}, "distil", schedule))


@pytest.mark.parametrize("method", REPAIRS)
def test_in_bf16_it_learns_nearly_the_same_and_the_weights_stay_float32(
    trained: nn.Module, pruned: nn.Module, method: str
) -> None:
    full, half = copy.deepcopy(pruned), copy.deepcopy(pruned)
    run(full, trained, method)
    run(half, trained, method, replace(SHORT, precision="bf16"))
    moved = apart = 0.0
    for start, one, two in zip(pruned.parameters(), full.parameters(), half.parameters(), strict=True):
        assert two.dtype == torch.float32
        moved += float((one - start).square().sum())
        apart += float((one - two).square().sum())
    assert 0 < apart < 0.05 * moved
    for name, rows in ZEROED.items():
        if rows:
            assert not half.get_parameter(name)[rows].any(), name
