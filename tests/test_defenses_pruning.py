"""ANP, AWM, BNP, RNP, TSBD, IMS: what each computes, against computations by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from little_nets import Mixed, WithoutNorm, coloured_images, same, snapshot
from nets import conv_bn, head, randomize_batch_norm, residual_net
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.clean import KEPT_IMAGES, CleanImages
from bshub.errors import InconclusiveError
from bshub.evaluation.defenses import anp, awm, bnp, ims, masking, rnp, tsbd
from bshub.evaluation.defenses.interface import Defense, DefenseSettings
from bshub.evaluation.defenses.pixels import PixelRange
from bshub.evaluation.defenses.training import epoch_batches, working_copy
from bshub.evaluation.defenses.unlearning import ascent_step
from bshub.evaluation.metrics import clean_accuracy

ALL: dict[str, Defense] = {
    "anp": anp.anp, "awm": awm.awm, "bnp": bnp.bnp, "ims": ims.ims, "rnp": rnp.rnp, "tsbd": tsbd.tsbd
}  # fmt: skip
BRIEF = DefenseSettings(seed=3, effort=0.005)


def clean_images(n: int = 30, batch: int = 7) -> CleanImages:
    images, labels = coloured_images(n, seed=99)
    return CleanImages(zip(images.split(batch), labels.split(batch), strict=True), torch.device("cpu"), n)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def loss_of(model: nn.Module, tensors: dict[str, Tensor] | None = None) -> float:
    images, labels = coloured_images(60, seed=7)
    with torch.no_grad():
        return float(F.cross_entropy(masking.call_with(model, tensors or {}, images), labels))


@pytest.fixture(scope="module")
def unsure(trained_once: nn.Module) -> nn.Module:
    """The trained net with softer answers: a loss of 1e-5 would take an ascent long to leave."""
    model = copy.deepcopy(trained_once)
    with torch.no_grad():
        model.fc.weight *= 0.1
        model.fc.bias *= 0.1
    return model


@pytest.mark.parametrize("name", ["anp", "bnp", "rnp"])
def test_a_model_without_batch_norm_is_inconclusive(name: str) -> None:
    with pytest.raises(InconclusiveError):
        ALL[name](WithoutNorm(), clean_images(), BRIEF)


@pytest.mark.parametrize("name", ["awm", "ims", "tsbd"])
def test_a_model_without_convolutions_is_inconclusive(name: str) -> None:
    with pytest.raises(InconclusiveError):
        ALL[name](nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), clean_images(), BRIEF)


# Masks and their threshold


def random_masks(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.rand(len(model.get_submodule(name).weight), generator=generator())
        for name in masking.scaled_norms(model)
    }


def without(model: nn.Module, masks: dict[str, Tensor], threshold: float) -> nn.Module:
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            pruned.get_parameter(name).mul_((mask > threshold).float())
    return pruned


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.3, 1.0])
def test_pruning_takes_the_highest_threshold_that_keeps_the_clean_accuracy(
    trained: nn.Module, tolerance: float
) -> None:
    clean, masks = clean_images(), random_masks(trained)
    model = copy.deepcopy(trained)
    chosen = masking.prune_by_accuracy(model, masks, clean, BRIEF, tolerance)

    def accuracy(threshold: float) -> float:
        return clean_accuracy(without(trained, masks, threshold), clean.batches(8)).value

    before = clean_accuracy(trained, clean.batches(8)).value
    allowed = [t for t in np.arange(19) / 20 if accuracy(t) > (1 - tolerance) * before]
    assert chosen == (pytest.approx(max(allowed)) if allowed else None)
    wanted = without(trained, masks, chosen) if chosen is not None else trained
    assert same(snapshot(wanted), snapshot(model))


def test_pruning_leaves_the_model_whole_where_every_threshold_costs_too_much(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    nothing_left = {name: torch.zeros_like(mask) for name, mask in random_masks(model).items()}
    assert masking.prune_by_accuracy(model, nothing_left, clean_images(), BRIEF, 0.1) is None
    assert same(snapshot(trained), snapshot(model))


def test_random_batches_hold_no_image_twice() -> None:
    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 3, 4, 4)
    clean = CleanImages([(images, torch.arange(10))], torch.device("cpu"))
    batches = masking.random_batches(clean, DefenseSettings(batch_size=6), generator(), augmented=False)
    for _ in range(5):
        batch, labels = next(batches)
        assert len(set(labels.tolist())) == 6
        assert torch.equal(batch[:, 0, 0, 0].long(), labels)


def test_pixel_range_is_the_normalisation_where_black_and_white_occur() -> None:
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1)
    raw = torch.rand(4, 3, 8, 8)
    raw[0, :, 0, 0], raw[1, :, 0, 0] = 0, 1
    images = (raw - mean) / std
    pixels = PixelRange.of(images)
    torch.testing.assert_close(pixels.span, 1 / std)
    change = torch.rand(1, 3, 8, 8) - 0.5
    wanted = ((raw + change).clamp(0, 1) - mean) / std
    torch.testing.assert_close(pixels.clip(pixels.add(images, change)), wanted)


# ANP


def test_anp_noise_is_sign_ascent_projected_onto_the_bound() -> None:
    slope = torch.tensor([3.0, -0.001, 20.0, -5.0])
    start = (2 * torch.rand(4, generator=generator()) - 1) * 0.4
    noise = anp.worst_noise(lambda noise: (slope * noise["a"]).sum(), {"a": slope}, 0.4, 1, generator())
    torch.testing.assert_close(noise["a"], (start + 0.4 * slope.sign()).clamp(-0.4, 0.4))
    more = anp.worst_noise(lambda noise: (slope * noise["a"]).sum(), {"a": slope}, 0.4, 4, generator())
    torch.testing.assert_close(more["a"], (start + 0.4 * slope.sign()).clamp(-0.4, 0.4))
    bowl = anp.worst_noise(lambda noise: -noise["a"].square().sum(), {"a": slope}, 0.4, 40, generator())
    assert bowl["a"].abs().max() <= 0.4 / 40 + 1e-6


def test_anp_noise_scales_masked_scales_and_shifts(trained: nn.Module) -> None:
    masks = {"bn1.weight": torch.rand(12)}
    noise = {"bn1.weight": torch.rand(12), "bn1.bias": torch.rand(12)}
    found = anp.perturbed(trained, masks, noise)
    torch.testing.assert_close(found["bn1.weight"], (masks["bn1.weight"] + noise["bn1.weight"]) * trained.bn1.weight)
    torch.testing.assert_close(found["bn1.bias"], (1 + noise["bn1.bias"]) * trained.bn1.bias)
    assert set(anp.perturbed(trained, masks, {})) == {"bn1.weight"}


def test_anp_steps_move_only_masks_within_bounds_down_the_mixed_loss(trained: nn.Module) -> None:
    student = copy.deepcopy(trained).train()
    student.requires_grad_(False)
    masks = {f"{name}.weight": torch.ones(len(student.get_submodule(name).weight)) for name in ("bn1", "bn2", "bn3")}
    masks = {name: mask.requires_grad_(True) for name, mask in masks.items()}
    optimizer = torch.optim.SGD(masks.values(), lr=0.2, momentum=0.9)
    images, labels = coloured_images(30)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    for step in range(15):
        old = {name: mask.detach().clone() for name, mask in masks.items()}
        noise = anp.mask_step(student, masks, optimizer, images, labels, 0.4, 1, 0.2, generator())
        assert all(value.abs().max() <= 0.4 for value in noise.values())
        assert noise.keys() == {f"bn{k}.{kind}" for k in (1, 2, 3) for kind in ("weight", "bias")}
        assert all(mask.min() >= 0 and mask.max() <= 1 for mask in masks.values())
        if step == 0:  # no momentum yet: one plain gradient step of the mixed loss
            leaves = {name: mask.requires_grad_(True) for name, mask in old.items()}
            losses = [
                F.cross_entropy(masking.call_with(student, anp.perturbed(student, leaves, n), images), labels)
                for n in ({}, noise)
            ]
            gradients = torch.autograd.grad(0.2 * losses[0] + 0.8 * losses[1], list(leaves.values()))
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                torch.testing.assert_close(masks[name].detach(), (leaf.detach() - 0.2 * gradient).clamp(0, 1))
    assert any(mask.min() < 0.9 for mask in masks.values())
    assert all(torch.equal(before[name], parameter) for name, parameter in student.named_parameters())


@pytest.mark.parametrize("name", ["anp", "rnp"])
def test_anp_and_rnp_change_nothing_but_scales_to_zero_and_keep_the_clean_accuracy(
    unsure: nn.Module, name: str
) -> None:
    clean = clean_images()
    defended = ALL[name](unsure, clean, DefenseSettings(effort=0.6 if name == "rnp" else 0.01))
    zeroed = 0
    for key, tensor in defended.state_dict().items():
        old = unsure.state_dict()[key]
        if key.startswith("bn") and key.endswith(".weight"):
            assert torch.equal(tensor[tensor != 0], old[tensor != 0])
            zeroed += int((tensor == 0).sum())
        else:
            assert torch.equal(tensor, old), key
    assert zeroed
    before, after = (clean_accuracy(model, clean.batches(8)).value for model in (unsure, defended))
    assert after > 0.9 * before


# AWM


@pytest.mark.parametrize("bound", [5.0, 1e6])
def test_awm_trigger_climbs_from_zero_and_is_rescaled_to_its_bound(trained: nn.Module, bound: float) -> None:
    images, labels = coloured_images(20)
    pixels = PixelRange.of(images)
    trigger = awm.universal_trigger(trained, iter([(images, labels)] * 3), pixels, 10.0, bound)
    by_hand = torch.zeros(1, *images.shape[1:])
    for _ in range(3):
        by_hand.requires_grad_(True)
        logits = trained(images + by_hand * pixels.span)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, trained(images).argmax(1)), by_hand)
        by_hand = by_hand.detach() + 10 * gradient
    by_hand = by_hand * min(1.0, bound / float(by_hand.abs().sum()))
    torch.testing.assert_close(trigger, by_hand)
    assert float(trigger.abs().sum()) <= bound * (1 + 1e-5)
    assert float(trigger.abs().sum()) > 0
    assert F.cross_entropy(trained(pixels.add(images, trigger)), labels) > F.cross_entropy(trained(images), labels)


def test_awm_loss_is_the_weighted_sum() -> None:
    logits, triggered, labels = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    masks = {"a": torch.rand(3, 2, 1, 1), "b": torch.rand(2, 3, 3, 3)}
    rows = torch.arange(5)
    wanted = -0.9 * logits.log_softmax(1)[rows, labels].mean() - 0.1 * triggered.log_softmax(1)[rows, labels].mean()
    wanted = wanted + 1e-3 * (masks["a"].sum() + masks["b"].sum())
    torch.testing.assert_close(awm.mask_loss(logits, triggered, labels, masks, 0.9, 1e-3), wanted)


def test_awm_shrinks_convolution_weights_and_nothing_else(trained: nn.Module) -> None:
    defended = awm.awm(trained, clean_images(), DefenseSettings(effort=0.2))
    for key, tensor in defended.state_dict().items():
        old = trained.state_dict()[key]
        if key.startswith("conv"):
            share = tensor / old
            assert 0 <= share.min() <= share.max() <= 1
            assert 0 < share.float().mean() < 0.999
        else:
            assert torch.equal(tensor, old), key


def test_awm_makes_the_trigger_of_its_own_kind_less_effective(trained: nn.Module) -> None:
    images, labels = coloured_images(60, seed=7)
    pixels = PixelRange.of(images)
    defended = awm.awm(trained, clean_images(), DefenseSettings(effort=0.25), bound=300.0)

    def damage(model: nn.Module) -> float:
        trigger = awm.universal_trigger(model, iter([(images, labels)] * 5), pixels, 10.0, 75.0)
        return float(F.cross_entropy(model(pixels.add(images, trigger)), labels))

    assert damage(defended) < damage(trained)


@pytest.mark.parametrize(("n", "alpha", "bound"), [(5, 0.99, 100.0), (6, 0.9, 1000.0)])
def test_awm_knows_one_image_per_class(n: int, alpha: float, bound: float) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(residual_net(4, 1))  # five classes
    settings = DefenseSettings(effort=0.1)
    default = awm.awm(model, clean_images(n), settings)
    explicit = awm.awm(model, clean_images(n), settings, alpha=alpha, bound=bound)
    other = awm.awm(model, clean_images(n), settings, alpha=0.5)
    assert same(snapshot(default), snapshot(explicit))
    assert not same(snapshot(default), snapshot(other))


def test_awm_puts_nine_crops_beside_each_image() -> None:
    images, labels = coloured_images(6)
    more = awm.one_shot_copies(CleanImages([(images, labels)], torch.device("cpu")))
    assert more.images.shape == (60, 3, 16, 16)
    assert torch.equal(more.images[:6], images)
    assert torch.equal(more.labels, labels.repeat(10))
    assert all(not torch.equal(copy, images[k % 6]) for k, copy in enumerate(more.images[6:]))
    many = CleanImages([(torch.rand(300, 3, 4, 4), torch.zeros(300).long())], torch.device("cpu"))
    assert len(awm.one_shot_copies(many).images) == 900 <= KEPT_IMAGES


# BNP


def test_bnp_divergence_is_that_of_gaussians() -> None:
    mean, other = torch.randn(2, 50).double()
    variance, others = (torch.rand(2, 50) + 0.1).double()
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()), torch.distributions.Normal(other, others.sqrt())
    )
    torch.testing.assert_close(bnp.gaussian_kl(mean, variance, other, others), wanted)


@pytest.mark.parametrize("u", [0.5, 3.0])
def test_bnp_flags_above_mean_plus_u_deviations(u: float) -> None:
    values = torch.cat([torch.randn(40, generator=generator()), torch.tensor([30.0])])
    wanted = [value > np.mean(values.tolist()) + u * np.std(values.tolist(), ddof=1) for value in values.tolist()]
    assert bnp.outliers(values, u).tolist() == wanted
    assert wanted[-1]


@pytest.mark.parametrize("batch_size", [7, 128])
def test_bnp_moments_are_those_of_all_images_together(trained: nn.Module, batch_size: int) -> None:
    clean = clean_images()
    clean.drain()
    moments = bnp.input_moments(trained, ["bn1", "bn3"], clean, DefenseSettings(batch_size=batch_size))
    values = trained.conv1(clean.images).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(moments["bn1"][0], values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments["bn1"][1], values.var(1), rtol=1e-5, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in trained.modules())


def test_bnp_prunes_the_channel_whose_recorded_statistics_are_not_the_clean_ones(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    mean = model.bn2.running_mean
    mean[5] += 20 * model.bn2.running_var[5].sqrt()
    defended = bnp.bnp(model, clean_images(), DefenseSettings())
    assert (defended.bn2.weight == 0).nonzero().flatten().tolist() == [5]
    assert torch.equal(defended.bn2.bias, model.bn2.bias)


def test_bnp_is_not_blinded_by_a_dead_channel(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model.conv2.weight[3] = 0  # constant input: variance zero
    model.bn2.running_mean[3], model.bn2.running_var[3] = 0, 0
    model.bn2.running_mean[5] += 20 * model.bn2.running_var[5].sqrt()
    assert (bnp.bnp(model, clean_images(), DefenseSettings()).bn2.weight == 0)[5]


# Unlearning, RNP


def test_unlearning_raises_the_clean_loss_and_stops_at_its_threshold(unsure: nn.Module) -> None:
    clean = clean_images()
    with working_copy(unsure, BRIEF) as (student, order):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
        accuracy = rnp.unlearn(student, clean, BRIEF, order, optimizer, 84, 0.2)
    assert accuracy <= 0.2
    assert loss_of(student) > 2 * loss_of(unsure)
    with working_copy(unsure, BRIEF) as (student, order):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
        assert rnp.unlearn(student, clean, BRIEF, order, optimizer, 3, 0.2) > 0.2  # not there in three steps


def test_unlearning_takes_a_step_into_infinity_back(trained: nn.Module) -> None:
    student = copy.deepcopy(trained)
    images, labels = coloured_images(8)
    optimizer = torch.optim.SGD(student.parameters(), lr=float("inf"))
    assert ascent_step(student, optimizer, images, labels) is None
    assert all(torch.equal(trained.state_dict()[key], tensor) for key, tensor in student.state_dict().items())


def test_rnp_recovers_with_masks_alone(unsure: nn.Module) -> None:
    clean = clean_images()
    with working_copy(unsure, BRIEF) as (student, order):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
        rnp.unlearn(student, clean, BRIEF, order, optimizer, 84, 0.2)
        before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
        masks = rnp.recover(student, ["bn1", "bn2", "bn3"], clean, BRIEF, order, 40, lr=0.2, momentum=0.9, alpha=0.2)
        assert all(torch.equal(before[name], parameter) for name, parameter in student.named_parameters())
        assert all(mask.min() >= 0 and mask.max() <= 1 for mask in masks.values())
        images, labels = next(epoch_batches(clean, BRIEF, order))
        masked = {name: mask * before[name] for name, mask in masks.items()}
        recovered, unlearned = (
            F.cross_entropy(masking.call_with(student, tensors, images), labels) for tensors in (masked, {})
        )
    assert recovered < unlearned


# TSBD


def test_tsbd_neuron_weight_change_is_the_l1_norm_of_the_difference() -> None:
    before, after = torch.randn(2, 6, 3, 2, 2)
    wanted = [sum(abs(float(a) - float(b)) for a, b in zip(x.ravel(), y.ravel(), strict=True))
              for x, y in zip(after.numpy(), before.numpy(), strict=True)]  # fmt: skip
    torch.testing.assert_close(tsbd.neuron_weight_change({"w": after - before})["w"], torch.tensor(wanted))


@pytest.mark.parametrize(("neurons", "weights"), [(0.15, 0.7), (0.5, 0.01), (1.0, 1.0), (1e-6, 1e-6)])
def test_tsbd_resets_the_most_changed_weights_of_the_most_changed_neurons(neurons: float, weights: float) -> None:
    change = {"a": torch.rand(8, 3, 3, 3), "b": torch.rand(12, 2, 5, 5), "c": torch.rand(5, 4, 1, 1)}
    reset = tsbd.reinitialise(change, neurons, weights)
    rows = sorted(((float(d.sum()), name, o) for name, t in change.items() for o, d in enumerate(t)), reverse=True)
    rows = rows[: max(1, int(neurons * 25))]
    values = sorted(
        ((float(v), name, o, k) for _, name, o in rows for k, v in enumerate(change[name][o].flatten())), reverse=True
    )
    wanted = {entry[1:] for entry in values[: max(1, int(weights * len(values)))]}
    found = {(name, o, k) for name, t in reset.items() for o, k in t.flatten(1).nonzero().tolist()}
    assert found == wanted


def test_tsbd_resets_exactly_a_share_where_nothing_changed() -> None:
    reset = tsbd.reinitialise({"a": torch.zeros(10, 2, 3, 3)}, 0.2, 0.5)
    assert int(reset["a"].sum()) == 18


def test_tsbd_gradient_looks_ahead_along_each_tensor_by_itself() -> None:
    matrix = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    x, y = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([0.5], requires_grad=True)

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return tensors["x"] @ matrix @ tensors["x"] / 2 + tensors["y"].pow(3).sum() + tensors["x"].sum() * tensors["y"]

    found = tsbd.calm_gradient(loss, {"x": x, "y": y}, 0.1, 0.7, {})
    first_x, first_y = matrix @ x + y, 3 * y**2 + x.sum()
    ahead_x, ahead_y = x + 0.1 * first_x / first_x.norm(), y + 0.1 * first_y / first_y.norm()
    torch.testing.assert_close(found["x"], 0.3 * first_x + 0.7 * (matrix @ ahead_x + ahead_y))
    torch.testing.assert_close(found["y"], 0.3 * first_y + 0.7 * (3 * ahead_y**2 + ahead_x.sum()))
    plain = tsbd.calm_gradient(loss, {"x": x, "y": y}, 0.1, 0.0, {})
    torch.testing.assert_close(plain["x"], first_x)


def test_tsbd_look_ahead_leaves_no_trace_in_the_running_statistics(trained: nn.Module) -> None:
    images, labels = coloured_images(20)
    plain, calm = copy.deepcopy(trained).train(), copy.deepcopy(trained).train()
    plain(images)
    buffers = {name: buffer.clone() for name, buffer in calm.named_buffers()}
    tsbd.calm_gradient(
        lambda tensors: F.cross_entropy(masking.call_with(calm, tensors, images), labels),
        dict(calm.named_parameters()), 0.05, 0.7, buffers,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), calm.buffers(), strict=True))


def test_tsbd_without_fine_tuning_is_the_original_with_zeros(trained: nn.Module) -> None:
    defended = tsbd.tsbd(trained, clean_images(), BRIEF, lr=0.0)
    zeros = neurons = 0
    for name, parameter in defended.named_parameters():
        kept = parameter != 0
        assert torch.equal(parameter[kept], trained.get_parameter(name)[kept])
        assert name.startswith("conv") or kept.all()
        zeros += int((~kept).sum())
        neurons += int((~kept).view(len(kept), -1).any(1).sum())
    assert zeros > 0
    assert 0 < neurons <= 6  # 15 % of 40


def test_tsbd_unlearning_ends_at_its_threshold(unsure: nn.Module) -> None:
    clean = clean_images()
    with working_copy(unsure, BRIEF) as (student, order):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
        epochs = tsbd.unlearn(student, clean, BRIEF, order, optimizer, 200, 0.5)
    assert epochs < 200
    assert clean_accuracy(student, clean.batches(8)).value <= 0.5


# IMS


def test_ims_masks_and_their_inverse_share_what_is_selected(trained: nn.Module) -> None:
    masks = ims.Masks(trained, 20.0)
    name = "conv2.weight"
    assert (masks.values(inverse=False)[name] == 1).all()
    assert (masks.values(inverse=True)[name] == 1).all()
    with torch.no_grad():
        masks.masks[name].copy_(torch.linspace(0, 1, 16))
        masks.selections[name].copy_(torch.tensor([0.0, 1.0, 0.3, 0.0] * 4))
    kept = 1 / (1 + np.exp(-20 * (np.linspace(0, 1, 16) - 0.5)))
    chosen = np.array([0.0, 1.0, 0.3, 0.0] * 4)
    normal, inverse = (masks.values(inverse=flag)[name].detach().numpy() for flag in (False, True))
    np.testing.assert_allclose(normal, kept + chosen * (1 - kept), rtol=1e-5)
    np.testing.assert_allclose(inverse, 1 - kept + chosen * kept, rtol=1e-5)
    np.testing.assert_allclose((normal + inverse)[chosen == 0], 1, rtol=1e-5)
    torch.testing.assert_close(masks.sparsity(), torch.tensor((4 * 2.7 + 24 * 0) / 40))


def test_ims_agreement_is_the_overlap_of_the_answers() -> None:
    one, other = torch.randn(2, 6, 5)
    overlap = (np.exp(one.log_softmax(1).numpy()) * np.exp(other.log_softmax(1).numpy())).sum(1)
    assert float(ims.agree(one, other)) == pytest.approx(-np.log(overlap).mean(), rel=1e-4)
    assert float(ims.disagree(one, other)) == pytest.approx(-np.log(1 - overlap).mean(), rel=1e-4)


@pytest.mark.parametrize("bound", [1.0, 0.004])
def test_ims_perturbations_lower_the_inner_loss_within_their_bound(trained: nn.Module, bound: float) -> None:
    images, _ = coloured_images(12)
    pixels = PixelRange.of(images)
    model = copy.deepcopy(trained).requires_grad_(False)
    masks = ims.Masks(model, 20.0)
    with torch.no_grad():
        for mask, selection in zip(masks.masks.values(), masks.selections.values(), strict=True):
            mask[::2], selection[:] = 0.2, 0.2
    found = ims.find_perturbations(model, masks, images, pixels, 0.001, 20, bound)
    assert found.shape == images.shape
    assert 0 < found.abs().max() <= min(bound, 0.025)

    def inner(perturbations: Tensor) -> float:
        changed = pixels.add(images, perturbations)
        loss = ims.agree(masks.classify(changed, inverse=True), model(changed))
        return float(loss + ims.disagree(model(changed), model(images)))

    assert inner(found) < inner(torch.zeros_like(found))


def test_ims_outer_loss_is_the_sum_of_its_five_terms(trained: nn.Module) -> None:
    model = copy.deepcopy(trained).requires_grad_(False)
    images, _ = coloured_images(9)
    changed = images + 0.3 * torch.randn(images.shape, generator=generator())
    masks = ims.Masks(model, 20.0)
    with torch.no_grad():
        for mask, selection in zip(masks.masks.values(), masks.selections.values(), strict=True):
            mask[::3], selection[:] = 0.4, 0.5

    def answer(x: Tensor, inverse: bool) -> Tensor:
        hooked = copy.deepcopy(model)
        for name, value in masks.values(inverse=inverse).items():
            conv = hooked.get_submodule(name.removesuffix(".weight"))
            conv.register_forward_hook(lambda module, args, out, v=value: out * v.view(1, -1, 1, 1))
        return hooked(x)

    p, q = (model(x).softmax(1) for x in (images, changed))
    masked, masked_changed = (answer(x, False).softmax(1) for x in (images, changed))
    inverse, inverse_changed = (answer(x, True).softmax(1) for x in (images, changed))
    wanted = -(
        (masked * p).sum(1).log() + (masked_changed * p).sum(1).log() + (inverse_changed * q).sum(1).log()
        + (1 - (inverse_changed * p).sum(1)).log() + (1 - (inverse * p).sum(1)).log()
    ).mean()  # fmt: skip
    torch.testing.assert_close(ims.outer_loss(model, masks, images, changed), wanted, rtol=1e-4, atol=1e-5)


def test_ims_folds_its_masks_into_filters_and_biases() -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(Mixed())  # the first convolution has a bias
    defended = ims.ims(model, clean_images(), DefenseSettings(effort=0.05), lr=0.3, l1_weight=0.0, perturbation_steps=1)
    changed = 0
    for name in ("conv1", "conv2", "conv3"):
        old, new = model.get_submodule(name), defended.get_submodule(name)
        value = (new.weight / old.weight).detach().flatten(1)
        torch.testing.assert_close(value, value[:, :1].expand_as(value))
        assert -1e-6 <= value.min() <= value.max() <= 1 + 1e-6
        if old.bias is not None:
            torch.testing.assert_close(new.bias, old.bias * value[:, 0])
        changed += int((value[:, 0] < 0.99).sum())
    assert changed
    assert torch.equal(defended.fc.weight, model.fc.weight)


def test_ims_ends_a_phase_without_progress_and_keeps_its_variables_in_bounds() -> None:
    variable = torch.full((3,), 0.5, requires_grad=True)
    batches = iter([torch.tensor(1.0)] * 50)
    rounds = ims.run_phase(lambda x: x * (10 + variable.sum()), batches, [variable], BRIEF, 0.3, 4, 0.98)
    assert rounds < 50
    assert variable.tolist() == [0, 0, 0]


def test_ims_leaves_convolutions_out_that_normalise_their_weights() -> None:
    torch.manual_seed(0)
    standardised = nn.Sequential(conv_bn(3, 8), StdConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), head(8, 3))
    masks = ims.Masks(standardised.eval(), 20.0)
    assert list(masks.masks) == ["0.0.weight"]
