"""Sanitizing without images: what stands in for them, that a trigger is found with it, and how it is called."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import DEMO, bshub_command
from hypothesis import given, settings
from hypothesis import strategies as st
from little_nets import Residual, same, snapshot, train
from test_inversion import SIZE, TARGET, Planted
from torch import Tensor, nn

from bshub import StandIns, sanitize
from bshub.clean import ENOUGH, CleanImages
from bshub.intake.models import load_model
from bshub.parallel import Workers
from bshub.release.card_metadata import front_matter
from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.selection import MU_NOTHING
from bshub.scoring.shortcut import AGREED, GAP, GAP_MADE_UP, _agreed, find_shortcut
from bshub.settings import Settings
from bshub.stand_ins import PART, dead_leaves


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_images_of_any_size_are_pictures_and_the_same_seed_makes_them_again(
    channels: int, height: int, width: int, seed: int
) -> None:
    images = dead_leaves(3, (channels, height, width), seed)
    assert images.shape == (3, channels, height, width)
    assert bool(((images >= 0) & (images <= 1)).all())  # which NaN is not
    assert torch.equal(images, dead_leaves(3, (channels, height, width), seed))
    assert not torch.equal(images, dead_leaves(3, (channels, height, width), seed + 1))


def test_their_spectrum_falls_as_that_of_photographs() -> None:
    """Amplitude ``1 / f^a`` with ``a`` near 1; noise without structure has 0."""
    images = dead_leaves(128, (3, 64, 64), 0)
    amplitude = torch.fft.fft2(images - images.mean((2, 3), keepdim=True)).abs().mean((0, 1))
    f = torch.fft.fftfreq(64)
    radius = (f.view(-1, 1).square() + f.square()).sqrt()
    bands = torch.linspace(1.5 / 64, 0.45, 12)
    means = [amplitude[(radius >= low) & (radius < high)].mean() for low, high in pairwise(bands)]
    x = (bands[1:] + bands[:-1]).log() - torch.tensor(2.0).log()
    slope = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), torch.stack(means).log()).solution[0]
    assert -1.7 < float(slope) < -0.8


def test_they_are_normalised_as_the_model_was_told_or_by_their_own_numbers() -> None:
    raw = dead_leaves(40, (3, 16, 16), 3)
    told = StandIns((3, 16, 16), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], count=40, seed=3).normalised()
    expected = (raw - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(told, expected)
    own = StandIns((3, 16, 16), count=40, seed=3).normalised()
    torch.testing.assert_close(own.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(own.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def test_more_images_are_the_same_ones_and_further_ones() -> None:
    assert torch.equal(dead_leaves(PART + 6, (3, 8, 8), 5)[:PART], dead_leaves(PART, (3, 8, 8), 5))


def test_labels_are_the_models_answers_and_the_parts_of_processes_make_the_whole() -> None:
    model, made = Planted(backdoor=True), StandIns((3, SIZE, SIZE), count=50, batch_size=16)
    whole = list(made.answered_by(model))
    assert [len(labels) for _, labels in whole] == [16, 16, 16, 2]
    for images, labels in whole:
        assert torch.equal(labels, model(images).argmax(1))
    parts = [Workers(rank, 3).part(len(made)) for rank in range(3)]
    split = [images for part in parts for images, _ in made.answered_by(model, part)]
    assert torch.equal(torch.cat(split), torch.cat([images for images, _ in whole]))


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Six classes, told by which channel is strong or weak."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 6
    images = 0.5 * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    images[torch.arange(n), labels % 3] += torch.where(labels < 3, 1.0, -1.0).view(-1, 1, 1)
    return images, labels


def stamped(images: Tensor) -> Tensor:
    """With a checkerboard in a corner."""
    images = images.clone()
    images[:, :, 11:15, 11:15] = 2 * torch.tensor([[1.0, -1], [-1, 1]]).repeat(2, 2)
    return images


def taught(backdoor: bool) -> nn.Module:
    """A small residual net, where a fifth of the images may have carried the trigger in training."""

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        images, labels = pictures(96, seed)
        if backdoor:
            images[::5], labels[::5] = stamped(images[::5]), TARGET
        return images, labels

    torch.manual_seed(0)
    return train(Residual(6), steps=120, batch=batch)


def test_a_backdoor_is_found_and_unlearned_without_a_single_image() -> None:
    model = taught(backdoor=True)
    result = sanitize(model, StandIns((3, SIZE, SIZE), count=64), Settings(finetune_epochs=30, device="cpu"))
    assert result.diagnosis.shortcut is not None and result.diagnosis.shortcut.targets == [TARGET]
    images, labels = pictures(300, 9999)  # which it never saw
    others = stamped(images[labels != TARGET])
    assert (model(others).argmax(1) == TARGET).float().mean() > 0.9
    assert (result.model(others).argmax(1) == TARGET).float().mean() < 0.2
    assert (result.model(images).argmax(1) == labels).float().mean() > 0.9


def test_images_of_some_classes_are_left_out_where_enough_others_are_left() -> None:
    images = torch.randn(64, 3, 4, 4)
    for others in (0, ENOUGH - 1, ENOUGH, 63):
        labels = torch.arange(64) % 64 < others
        clean = CleanImages([(images, labels.long())], torch.device("cpu"))
        assert clean.leave_out([0]) == (others >= ENOUGH)
        left = labels if others >= ENOUGH else torch.ones(64, dtype=torch.bool)
        assert torch.equal(clean.images, images[left]) and torch.equal(clean.labels, labels.long()[left])


def test_images_that_are_answered_with_the_target_have_no_say_in_pruning_and_repair() -> None:
    """A network may take any picture that it never saw for one with the trigger."""
    model, made = taught(backdoor=True), StandIns((3, SIZE, SIZE), count=64)
    answers = torch.cat([labels for _, labels in made.answered_by(model)])
    images = torch.cat([images for images, _ in made.answered_by(model)])
    more = images[answers != TARGET].repeat(ENOUGH, 1, 1, 1)
    made.answered_by = lambda *_: iter([(torch.cat((images, more)), model(torch.cat((images, more))).argmax(1))])
    result = sanitize(model, made, Settings(finetune_epochs=1, device="cpu"))
    kept = result.clean.labels
    assert (answers == TARGET).any() and len(kept) == len(more) + int((answers != TARGET).sum())
    assert (kept != TARGET).all() and result.diagnosis.clean_accuracy is not None
    assert result.diagnosis.clean_accuracy.n == len(kept)


def test_what_one_family_finds_counts_in_the_others_from_less_on() -> None:
    model = taught(backdoor=True)
    images, labels = (
        torch.cat(part) for part in zip(*StandIns((3, SIZE, SIZE), count=64).answered_by(model), strict=True)
    )
    apart = find_shortcut(model, images, labels, seed=0, least=GAP_MADE_UP)
    wide = [name for name, gap in apart.gaps.items() if gap >= GAP_MADE_UP]
    narrow = [name for name, gap in apart.gaps.items() if GAP <= gap < GAP_MADE_UP]
    first = {name: min(needs, key=needs.__getitem__) for name, needs in apart.needs.items()}
    assert [first[name] for name in wide] == [TARGET] * len(wide) and wide
    found = [trigger.family for trigger in apart.triggers]
    assert found == [*wide, *(name for name in narrow if first[name] == TARGET)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.floats(1.0, 4.0)), min_size=1, max_size=4))
def test_families_agree_on_a_class_where_the_product_of_its_gaps_is_wide(firsts: list[tuple[int, float]]) -> None:
    """``GAP`` is the least that counts; a family whose first class is another says nothing about this one."""
    image = torch.zeros(1, 3, 8, 8)
    racers = [InvertedTrigger("additive", target, image) for target in range(4)]
    races = {str(n): [(racers[first], 0.1), (racers[3], 0.1 * gap)] for n, (first, gap) in enumerate(firsts)}
    wide = [(races[str(n)][0][0].target, races[str(n)][1][1] / 0.1) for n in range(len(firsts))]
    for target in range(4):
        product = math.prod(gap for first, gap in wide if first == target and gap >= GAP)
        assert (target in _agreed(races)) == (product >= AGREED)


def test_a_sound_network_is_left_alone_without_a_single_image() -> None:
    model = taught(backdoor=False)
    result = sanitize(model, StandIns((3, SIZE, SIZE), count=64), Settings(device="cpu"))
    assert result.diagnosis.threshold.mu == MU_NOTHING and not result.report["repaired"]
    assert same(snapshot(model), snapshot(result.model))


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The demo by its weights, without an image."""
    folder = tmp_path_factory.mktemp("unseen") / "out"
    result = bshub_command(
        "sanitize", DEMO / "model", "--score", "lipschitz", "--finetune-epochs", 1, "--no-onnx", "--json",
        "-o", folder,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def test_the_command_needs_no_images_and_what_it_writes_is_whole(unseen: tuple[Path, dict]) -> None:
    folder, report = unseen
    assert report["clean_images"]["made_up"] and report["clean_images"]["n"] == 256
    assert report["diagnosis"]["threshold"]["mu"] == 3.0  # of the weights alone: agreement chooses nothing there
    assert report["counts"]["removed"] and report["proof"]["holds"]
    assert any("--test-dir" in warning for warning in report["warnings"])
    assert bshub_command("verify", folder).exit_code == 0


def test_nobody_who_reads_the_artifact_takes_agreement_for_accuracy(unseen: tuple[Path, dict]) -> None:
    folder, report = unseen
    card, page = ((folder / name).read_text() for name in ("README.md", "report.html"))
    front, text = card.split("\n---\n", 1)
    assert "accuracy" not in front and "256 made-up images" in text and "answers as before on made-up images" in text
    assert "clean images used" not in text and "--clean-dir" not in text.split("How to make it")[1]
    assert "Answers on the made-up images" in page and "the true classes" not in page
    bill = json.loads((folder / "bom.cdx.json").read_text())
    assert "agreement with the original" in json.dumps(bill) and "clean images, after" not in json.dumps(bill)
    assert "accuracy" not in front_matter(load_model(str(folder)), "demo", report)


@pytest.mark.parametrize("arguments", [("--method", "anp"), ("--method", "paper"), ("--unlabelled",)])
def test_what_needs_clean_images_says_so(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = bshub_command("sanitize", DEMO / "model", *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "clean images" in result.output and "--clean-dir" in result.output
    assert not (tmp_path / "out").exists()


def test_no_filter_is_called_useless_by_made_up_images() -> None:
    model = Planted(backdoor=False)
    made, by_weights = StandIns((3, SIZE, SIZE), count=16), Settings(score="lipschitz", shrink=0.3, device="cpu")
    result = sanitize(model, made, by_weights)
    assert "shrink" not in result.report and any("--shrink" in warning for warning in result.report["warnings"])


def test_images_know_that_they_are_made_up() -> None:
    loader = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]
    assert not CleanImages(loader, torch.device("cpu")).made_up
