"""Six published defenses against their own equations, on nets whose every number can be computed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from little_nets import Dense, Mixed, Residual, coloured_images, same, snapshot
from nets import Auxiliary, randomize_batch_norm, vgg_like
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.clean import CleanImages
from bshub.errors import InconclusiveError
from bshub.evaluation.defenses.clp import clp
from bshub.evaluation.defenses.fine_pruning import fine_pruning
from bshub.evaluation.defenses.ft import finetune, ft
from bshub.evaluation.defenses.ft_sam import ft_sam, perturbed, smoothed_cross_entropy, worst_step
from bshub.evaluation.defenses.i_bau import hypergradient, i_bau, worst_perturbation
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.evaluation.defenses.nad import attention_loss, attention_map, nad
from bshub.evaluation.defenses.stages import Stage, find_stages, run_with_stages
from bshub.evaluation.defenses.training import epoch_batches, logits_of, run_epochs, working_copy
from bshub.evaluation.metrics import clean_accuracy
from bshub.graph.trace import in_mode

SETTINGS = DefenseSettings(seed=5, batch_size=64)


def clean_images(n: int = 30, classes: int = 3) -> CleanImages:
    images, labels = coloured_images(n, seed=77)
    return CleanImages([(images, labels % classes)], torch.device("cpu"))


def fresh(seed: int = 0) -> Residual:
    torch.manual_seed(seed)
    return randomize_batch_norm(Residual(), seed)  # type: ignore[return-value]


def one_batch(clean: CleanImages) -> tuple[Tensor, Tensor]:
    """The batch that a defense with ``SETTINGS`` sees first."""
    return next(epoch_batches(clean, SETTINGS, torch.Generator().manual_seed(SETTINGS.seed)))


# training.py


@pytest.mark.parametrize(("n", "size"), [(4, 128), (9, 4), (5, 4), (8, 1), (7, 3), (4, 2)])
def test_an_epoch_shows_every_image_once_and_none_alone(n: int, size: int) -> None:
    images = torch.arange(float(n)).view(n, 1, 1, 1).expand(n, 3, 8, 8)
    clean = CleanImages([(images, torch.arange(n))], torch.device("cpu"))
    batches = list(epoch_batches(clean, DefenseSettings(batch_size=size), torch.Generator().manual_seed(0)))
    assert min(len(labels) for _, labels in batches) >= 2
    assert max(len(labels) for _, labels in batches) <= max(2, size) + 1
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(n))
    assert all(torch.equal(x[:, 0, 0, 0].long(), labels) for x, labels in batches)


def test_the_order_is_random_and_another_one_in_each_epoch() -> None:
    clean, generator = clean_images(30), torch.Generator().manual_seed(0)
    first, second, again = (
        next(epoch_batches(clean, SETTINGS, source, augmented=False))[0]
        for source in (generator, generator, torch.Generator().manual_seed(0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, clean.images)


def test_images_that_were_not_streamed_yet_are_read_before_the_first_epoch() -> None:
    images, labels = coloured_images(12)
    clean = CleanImages(zip(images.split(4), labels.split(4), strict=True), torch.device("cpu"))
    assert sum(len(y) for _, y in epoch_batches(clean, SETTINGS, torch.Generator())) == 12


def test_a_working_copy_follows_the_seed_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 3)).train()
    model[0].weight.requires_grad_(False)
    before, state, drawn = snapshot(model), torch.get_rng_state(), []
    for noise in range(2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        with working_copy(model, SETTINGS) as (student, generator):
            assert student.training
            assert all(p.requires_grad for p in student.parameters())
            drawn.append((student(torch.ones(2, 3, 8, 8)), torch.rand(3, generator=generator)))
            drawn[-1][0].sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(module.training for module in student.modules())
        assert [p.requires_grad for p in student.parameters()] == [False, True, True, True]
        assert all(p.grad is None for p in student.parameters())
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert same(before, snapshot(model))


def test_epochs_report_their_mean_loss_and_every_step() -> None:
    weight, steps, after = nn.Parameter(torch.zeros(1)), [], []
    losses = run_epochs(
        3,
        clean_images(6),
        DefenseSettings(batch_size=4, progress=steps.append),
        torch.Generator().manual_seed(0),
        lambda images, labels: (weight - 1).square().sum(),
        torch.optim.SGD([weight], lr=0.25),
        after_step=lambda: after.append(float(weight)),
    )
    # each step halves the distance to 1; batches of 4 and 2 images
    assert after == pytest.approx([1 - 0.5**k for k in range(1, 7)])
    assert losses == pytest.approx([(4 * 0.25 ** (2 * e) + 2 * 0.25 ** (2 * e + 1)) / 6 for e in range(3)])
    assert steps == [1] * 6


# ft


def test_one_step_of_fine_tuning_is_the_sgd_step_of_the_cross_entropy() -> None:
    model, clean = fresh(), clean_images()
    tuned = ft(model, clean, SETTINGS, epochs=1, lr=0.1, weight_decay=0.01)
    oracle = copy.deepcopy(model).train()
    images, labels = one_batch(clean)
    F.cross_entropy(oracle(images), labels).backward()
    for (name, before), after in zip(oracle.named_parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * (before.grad + 0.01 * before), msg=name)
    for (name, wanted), found in zip(oracle.named_buffers(), tuned.buffers(), strict=True):
        assert torch.equal(wanted, found), name


def test_the_learning_rate_falls_along_a_cosine_over_the_epochs() -> None:
    model, clean = fresh(), clean_images()
    tuned = ft(model, clean, SETTINGS, epochs=3, lr=0.1, momentum=0.0, weight_decay=0.0)
    oracle, generator = copy.deepcopy(model).train(), torch.Generator().manual_seed(SETTINGS.seed)
    for lr in (0.1, 0.075, 0.025):  # 0.1 · (1 + cos(π e / 3)) / 2
        images, labels = next(epoch_batches(clean, SETTINGS, generator))
        gradients = torch.autograd.grad(F.cross_entropy(oracle(images), labels), list(oracle.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(oracle.parameters(), gradients, strict=True):
                parameter -= lr * gradient
    for (name, wanted), found in zip(oracle.named_parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, msg=name)


def test_fine_tuning_lowers_the_loss() -> None:
    with working_copy(fresh(), SETTINGS) as (student, generator):
        recipe = {"epochs": 30, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
        losses = finetune(student, clean_images(), SETTINGS, generator, **recipe)
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]


def test_auxiliary_heads_do_not_confuse_the_training() -> None:
    model = randomize_batch_norm(Auxiliary())
    assert isinstance(model.train()(torch.zeros(2, 3, 16, 16)), tuple)
    images, labels = clean_images().images, clean_images().labels
    loss = F.cross_entropy(logits_of(model, images), labels)
    tuned = ft(model, clean_images(), SETTINGS, epochs=10, lr=0.05)
    assert F.cross_entropy(tuned(images), labels) < loss
    assert torch.equal(tuned.aux[1][2].weight, model.aux[1][2].weight)


# fine-pruning


def idle_order(model: Residual, images: Tensor) -> list[int]:
    """Channels of the last map by mean activation, in plain operations."""
    with torch.no_grad():
        x = F.relu(model.bn1(model.conv1(images)))
        x = F.relu(x + model.bn3(model.conv3(F.relu(model.bn2(model.conv2(x))))))
    return torch.argsort(x.mean((0, 2, 3))).tolist()


def zero_channels(model: Residual) -> list[int]:
    return torch.nonzero((model.fc.weight == 0).all(0)).flatten().tolist()


@pytest.mark.parametrize("tolerance", [0.05, 0.3, 0.5])
def test_fine_pruning_silences_the_least_active_channels_up_to_the_tolerance(
    trained: Residual, tolerance: float
) -> None:
    images, labels = coloured_images(30, seed=77)
    labels[::3] = 1  # a third of them: the tolerance is relative to an accuracy well below one
    clean = CleanImages([(images, labels)], torch.device("cpu"))
    pruned = fine_pruning(trained, clean, SETTINGS, tolerance=tolerance, epochs=1, lr=1e-6)
    order, batch = idle_order(trained, clean.images), [(clean.images, clean.labels)]
    accuracies = []
    for count in range(len(order)):  # zeros written into the classifier's input: another way to the same network
        handle = trained.fc.register_forward_pre_hook(
            lambda module, args, gone=tuple(order[:count]): args[0].index_fill(1, torch.tensor(gone).long(), 0)
        )
        accuracies.append(clean_accuracy(trained, batch).value)
        handle.remove()
    bad = [k for k, accuracy in enumerate(accuracies) if accuracies[0] - accuracy >= tolerance * accuracies[0]]
    count = bad[0] - 1 if bad else len(order) - 1
    assert accuracies[0] < 0.8
    assert 0 < count < len(order)
    assert sorted(zero_channels(pruned)) == sorted(order[:count])
    assert sorted(torch.nonzero(pruned.bn3.weight == 0).flatten().tolist()) == sorted(order[:count])
    assert sorted(torch.nonzero(pruned.bn3.bias == 0).flatten().tolist()) == sorted(order[:count])


def test_silenced_channels_stay_exactly_zero_while_the_rest_is_fine_tuned(trained: Residual) -> None:
    pruned = fine_pruning(trained, clean_images(), SETTINGS, tolerance=0.3, epochs=20, lr=0.05)
    gone = zero_channels(pruned)
    assert len(gone) > 2
    assert gone == sorted(idle_order(trained, clean_images().images)[: len(gone)])
    assert not pruned.bn3.weight[gone].any()
    assert not pruned.bn3.bias[gone].any()
    stays = [c for c in range(12) if c not in gone]
    assert (pruned.fc.weight[:, stays] != trained.fc.weight[:, stays]).all()
    assert (pruned.conv1.weight != trained.conv1.weight).any()


def test_fine_pruning_without_tolerance_is_fine_tuning(trained: Residual) -> None:
    pruned = fine_pruning(trained, clean_images(), SETTINGS, tolerance=0.0, epochs=3)
    assert same(snapshot(pruned), snapshot(ft(trained, clean_images(), SETTINGS, epochs=3)))


def test_a_flattened_map_loses_every_place_of_a_silenced_channel() -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(vgg_like())
    pruned = fine_pruning(model, clean_images(), SETTINGS, tolerance=1.5, epochs=1)
    gone = torch.nonzero(pruned[4][1].weight == 0).flatten().tolist()
    assert len(gone) == 9  # all but the most active one of ten
    columns = torch.nonzero((pruned[6].weight == 0).all(0)).flatten().tolist()
    assert columns == [16 * channel + place for channel in gone for place in range(16)]


def test_fine_pruning_needs_a_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(InconclusiveError):
        fine_pruning(model, clean_images(), SETTINGS)


# nad


def test_an_attention_map_is_the_normalised_sum_of_squares_of_each_place() -> None:
    features = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = attention_map(features, 2.0)
    for n in range(2):
        energy = [[sum(float(features[n, c, i, j]) ** 2 for c in range(5)) for j in range(4)] for i in range(3)]
        norm = sum(value**2 for row in energy for value in row) ** 0.5
        wanted = torch.tensor([[value / (norm + 1e-6) for value in row] for row in energy])
        torch.testing.assert_close(found[n], wanted)
    torch.testing.assert_close(attention_map(3 * features, 2.0), found)  # size does not matter, place does


def test_attention_loss_is_the_weighted_error_of_the_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    mine, theirs = ([torch.randn(2, c, s, s, generator=generator) for c, s in [(3, 8), (5, 4)]] for _ in range(2))
    wanted = sum(
        beta * (attention_map(a, 2.0) - attention_map(b, 2.0)).square().mean()
        for a, b, beta in zip(mine, theirs, [500.0, 1000.0], strict=True)
    )
    torch.testing.assert_close(attention_loss(mine, theirs, [500.0, 1000.0], 2.0), wanted)
    assert attention_loss(mine, mine, [500.0, 1000.0], 2.0) == 0
    assert attention_loss([], [], [], 2.0) == 0


def test_the_attention_of_identical_networks_agrees_and_only_the_student_learns() -> None:
    student, images = fresh(), clean_images().images
    teacher, other = copy.deepcopy(student), fresh(seed=1)
    stages = find_stages(student, images, 3)
    maps = [run_with_stages(net, images, stages)[1] for net in (student, teacher, other)]
    assert attention_loss(maps[0], maps[1], [1000.0] * len(stages), 2.0) == 0
    loss = attention_loss(maps[0], maps[2], [1000.0] * len(stages), 2.0)
    loss.backward()
    assert loss > 0
    assert student.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in other.parameters())


class Shared(nn.Module):
    """One activation module for all, a map at each of four resolutions, and channels last for a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4, 4, 4))
        self.mix, self.act, self.fc = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for index, conv in enumerate(self.convs):
            x = self.act(conv(x))
            x = self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if index == 2 else x
            x = F.max_pool2d(x, 2) if index < 4 else x
        return self.fc(x.mean((2, 3)))


def test_stages_are_the_last_maps_at_the_smallest_resolutions() -> None:
    model = Shared()
    images = torch.randn(2, 3, 32, 32)
    stages = find_stages(model, images, 3)
    assert stages == [Stage("act", 2), Stage("act", 3), Stage("act", 4)]  # 8, 4, 2; the stem's 32 and 16 are left out
    answer, maps = run_with_stages(model, images, stages)
    assert [tuple(m.shape) for m in maps] == [(2, 4, s, s) for s in (8, 4, 2)]
    assert torch.equal(answer, model(images))
    assert torch.equal(model.fc(maps[2].mean((2, 3))), answer)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_network_of_one_resolution_has_one_stage() -> None:
    assert len(find_stages(fresh(), clean_images().images, 3)) == 1
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 3))
    assert find_stages(pool, torch.zeros(1, 3, 8, 8), 3) == []


def test_without_attention_nad_is_nesterov_sgd_that_falls_to_a_tenth_after_two_epochs() -> None:
    clean, model = clean_images(), fresh()
    student = nad(model, clean, SETTINGS, betas=(0.0, 0.0, 0.0), epochs=4, lr=0.02)
    oracle, generator = copy.deepcopy(model).train(), torch.Generator().manual_seed(SETTINGS.seed)
    velocity = [torch.zeros_like(p) for p in oracle.parameters()]
    for lr in (0.02, 0.02, 0.002, 0.002):
        images, labels = next(epoch_batches(clean, SETTINGS, generator))
        gradients = torch.autograd.grad(F.cross_entropy(oracle(images), labels), list(oracle.parameters()))
        with torch.no_grad():
            for parameter, gradient, v in zip(oracle.parameters(), gradients, velocity, strict=True):
                gradient = gradient + 1e-4 * parameter
                v.mul_(0.9).add_(gradient)
                parameter -= lr * (gradient + 0.9 * v)
    for (name, wanted), found in zip(oracle.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_the_student_steps_along_its_cross_entropy_and_the_attention_of_its_fine_tuned_copy() -> None:
    clean, model, recipe = clean_images(), fresh(), {"lr": 0.02, "momentum": 0.0, "weight_decay": 0.0}
    student = nad(model, clean, SETTINGS, teacher_epochs=3, epochs=1, betas=(1e3, 1e4, 1e5), **recipe)
    teacher = nad(model, clean, SETTINGS, teacher_epochs=1, epochs=3, betas=(), **recipe)  # plain fine-tuning
    oracle = copy.deepcopy(model).train()
    images, labels = one_batch(clean)
    stages = find_stages(model, images, 3)
    answer, learned = run_with_stages(oracle, images, stages)
    attention = attention_loss(learned, run_with_stages(teacher, images, stages)[1], [1e5], 2.0)
    (pull,) = torch.autograd.grad(attention, oracle.conv1.weight, retain_graph=True)
    (F.cross_entropy(answer, labels) + attention).backward()
    assert pull.norm() > 0.1 * oracle.conv1.weight.grad.norm()  # the attention has a say
    for (name, wanted), found in zip(oracle.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(found, wanted - 0.02 * wanted.grad, msg=name)


# clp


def bounds(weight: Tensor, norm: nn.BatchNorm2d, channels: slice = slice(None)) -> Tensor:
    """One singular value decomposition a filter."""
    scale = norm.weight.abs() / (norm.running_var + norm.eps).sqrt()
    sizes = [torch.linalg.svdvals(filter_.reshape(filter_.shape[0], -1)).max() for filter_ in weight.double()]
    return torch.stack(sizes).detach() * scale.detach()[channels].double()


def above(values: Tensor, u: float) -> list[int]:
    return torch.nonzero(values > values.mean() + u * values.std()).flatten().tolist()


@pytest.mark.parametrize("u", [0.5, 1.0, 3.0, 3.25])
@pytest.mark.parametrize("make", [Residual, Mixed])
def test_clp_silences_the_filters_that_one_decomposition_each_finds(make: Callable[[], nn.Module], u: float) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(make())
    model.conv3.weight.data[7] *= 40
    pruned = clp(model, clean_images(), SETTINGS, u=u)
    for layer in (1, 2, 3):
        conv, norm = model.get_submodule(f"conv{layer}"), model.get_submodule(f"bn{layer}")
        flagged = above(bounds(conv.weight, norm), u)
        after = pruned.get_submodule(f"bn{layer}")
        for name in ("weight", "bias"):
            wanted = norm.get_parameter(name).clone().detach()
            wanted[flagged] = 0
            assert torch.equal(after.get_parameter(name), wanted), (layer, name)
        assert torch.equal(pruned.get_submodule(f"conv{layer}").weight, conv.weight)
    # one of twelve lies at most 11/√12 = 3.18 deviations above the mean
    assert (pruned.bn3.weight[7] == 0) == (u < 3.18)


def test_clp_silences_a_filter_in_every_batch_norm_that_reads_it() -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(Dense())
    model.conv0.weight.data[4] *= 100
    pruned = clp(model, clean_images(), SETTINGS, u=1.5)
    for norm in (pruned.bn_a, pruned.bn_b, pruned.bn_c):
        assert norm.weight[4] == 0
        assert norm.bias[4] == 0
        assert (norm.weight[:6] == 0).sum() == 1


class Half(nn.Module):
    """Only the first four of eight filters have a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv(x).chunk(2, 1)
        return self.fc(torch.cat([self.bn(first), second], 1).mean((2, 3)))


def test_clp_judges_only_filters_with_a_batch_norm_and_among_themselves() -> None:
    torch.manual_seed(0)
    model = randomize_batch_norm(Half())
    model.conv.weight.data[2] *= 20
    model.conv.weight.data[6] *= 1000
    pruned = clp(model, clean_images(), SETTINGS, u=1.4)  # one of four lies at most 1.5 above
    assert torch.nonzero(pruned.bn.weight == 0).flatten().tolist() == [2]


def test_clp_leaves_a_network_without_outstanding_filters_alone() -> None:
    model = randomize_batch_norm(Residual())
    assert same(snapshot(model), snapshot(clp(model, clean_images(), SETTINGS, u=100.0)))


# ft-sam


def test_the_worst_step_has_the_closed_form_and_nothing_in_reach_is_worse() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(3, 4), (5,)]]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    w, g = (torch.cat([t.flatten() for t in ts]).detach() for ts in (parameters, [p.grad for p in parameters]))
    step = torch.cat([s.flatten() for s in worst_step(parameters, 2.0)])
    torch.testing.assert_close(step, 2.0 * w**2 * g / (w.abs() * g).norm())
    torch.testing.assert_close((step / w.abs()).norm(), torch.tensor(2.0))  # on the border: ‖T⁻¹ε‖ = ρ
    for _ in range(200):
        other = torch.randn(w.shape, generator=generator)
        other = 2.0 * w.abs() * other / other.norm()
        assert g @ other < g @ step


def test_weights_come_back_bit_for_bit_even_after_an_error() -> None:
    model, clean = fresh(), clean_images()
    F.cross_entropy(model(clean.images), clean.labels).backward()
    parameters = list(model.parameters())
    before, steps = [p.detach().clone() for p in parameters], worst_step(parameters, 2.0)
    with pytest.raises(KeyError), perturbed(parameters, 2.0):
        for parameter, w, step in zip(parameters, before, steps, strict=True):
            assert torch.equal(parameter, w + step)
        raise KeyError
    assert all(torch.equal(p, w) for p, w in zip(parameters, before, strict=True))


def test_no_gradient_means_no_step() -> None:
    parameter = nn.Parameter(torch.ones(3))
    assert torch.equal(worst_step([parameter], 2.0)[0], torch.zeros(3))
    parameter.grad = torch.zeros(3)
    assert torch.equal(worst_step([parameter], 2.0)[0], torch.zeros(3))


def test_one_step_of_ft_sam_goes_from_the_weights_along_the_gradient_of_their_worst_neighbour() -> None:
    model, clean = fresh(), clean_images()
    tuned = ft_sam(model, clean, SETTINGS, epochs=1, lr=0.1, weight_decay=0.01, rho=0.5)
    here, images_labels = copy.deepcopy(model).train(), one_batch(clean)

    def gradients(net: nn.Module) -> list[Tensor]:
        images, labels = images_labels
        target = torch.full((len(labels), 3), 0.05).scatter_(1, labels.unsqueeze(1), 0.9)
        loss = -(target * net(images).log_softmax(1)).sum(1).mean()
        return list(torch.autograd.grad(loss, list(net.parameters())))

    first = gradients(here)
    norm = sum(float((w.abs() * g).square().sum()) for w, g in zip(here.parameters(), first, strict=True)) ** 0.5
    there = copy.deepcopy(model).train()
    with torch.no_grad():
        for w, g in zip(there.parameters(), first, strict=True):
            w += 0.5 * w.square() * g / norm
    for (name, w), g, found in zip(here.named_parameters(), gradients(there), tuned.parameters(), strict=True):
        torch.testing.assert_close(found, w - 0.1 * (g + 0.01 * w), msg=name)
    for (name, wanted), found in zip(here.named_buffers(), tuned.buffers(), strict=True):
        assert torch.equal(wanted, found), name  # the neighbour's statistics leave no trace


def test_ft_sam_without_a_neighbourhood_is_fine_tuning() -> None:
    still = ft_sam(fresh(), clean_images(), SETTINGS, rho=0.0, smoothing=0.0, epochs=3)
    assert same(snapshot(still), snapshot(ft(fresh(), clean_images(), SETTINGS, epochs=3)))


def test_smoothing_spreads_the_label_over_the_other_classes() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    target = torch.full((6, 4), 0.1 / 3).scatter_(1, labels.unsqueeze(1), 0.9)
    torch.testing.assert_close(smoothed_cross_entropy(logits, labels, 0.1), F.cross_entropy(logits, target))


# i-bau


def quadratic() -> tuple[Tensor, Tensor, Tensor, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    a = root @ root.T / 4 + torch.eye(4, dtype=torch.float64)
    b, c = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 3), (4,)))
    return a, b, c, nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("terms", [1, 2, 5, 400])
def test_the_hypergradient_of_a_quadratic_is_the_neumann_series_and_in_the_limit_exact(terms: int) -> None:
    # inner = ½ δᵀAδ - δᵀBθ, so δ*(θ) = A⁻¹Bθ; outer = ½‖δ - c‖² + ½‖θ‖²
    a, b, c, theta = quadratic()
    delta = torch.linalg.solve(a, b @ theta.detach())
    (found,) = hypergradient(
        lambda d: 0.5 * (d - c).square().sum() + 0.5 * theta.square().sum(),
        lambda d: 0.5 * d @ a @ d - d @ b @ theta,
        delta,
        [theta],
        map_step=0.1,
        terms=terms,
    )
    map_ = torch.eye(4, dtype=torch.float64) - 0.1 * a  # ∂Φ/∂δ
    series = sum(torch.linalg.matrix_power(map_, k) for k in range(terms)) @ (delta - c)
    torch.testing.assert_close(found, theta.detach() + 0.1 * b.T @ series)
    exact = theta.detach() + b.T @ torch.linalg.solve(a, delta - c)
    assert torch.allclose(found, exact) == (terms == 400)


def test_the_hypergradient_follows_the_minimum_that_moves_with_a_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, centre = torch.randn(5, 3).double(), torch.tensor([1.0, -2.0, 0.5]).double()

    def inner(d: Tensor) -> Tensor:
        return d.square().sum() + 0.1 * net(x + d).square().mean()

    def outer(d: Tensor) -> Tensor:
        return (d - centre).square().sum() + net(x + d)[:, 0].mean()

    def reached() -> Tensor:  # the minimum of inner, by many plain steps
        d = torch.zeros(3).double().requires_grad_(True)
        for _ in range(150):
            d = (d - 0.3 * torch.autograd.grad(inner(d), d)[0]).detach().requires_grad_(True)
        return d.detach()

    found = hypergradient(outer, inner, reached(), list(net.parameters()), map_step=0.3, terms=200)
    weight = net[0].weight
    for index in [(0, 0), (2, 1), (3, 2)]:
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * 1e-4
            sides.append(float(outer(reached())))
            with torch.no_grad():
                weight[index] -= sign * 1e-4
        assert (sides[0] - sides[1]) / 2e-4 == pytest.approx(float(found[0][index]), rel=1e-4, abs=1e-7)


class Sharp(nn.Module):
    """A hard sigmoid, once as PyTorch's (no second derivative) and once written out."""

    def __init__(self, built_in: bool) -> None:
        super().__init__()
        self.first, self.second, self.built_in = nn.Linear(6, 8), nn.Linear(8, 3), built_in

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        gate = F.hardsigmoid(x) if self.built_in else F.relu6(x + 3) / 6
        return self.second(x * gate)


def test_where_autograd_has_no_second_derivative_differences_give_the_same_gradient() -> None:
    torch.manual_seed(0)
    nets = Sharp(False), Sharp(True)
    nets[1].load_state_dict(nets[0].state_dict())
    x, labels, delta = torch.randn(20, 6), torch.arange(20) % 3, torch.randn(1, 6) * 0.1
    found = [
        hypergradient(
            lambda d, net=net: F.cross_entropy(net(x + d), labels),
            lambda d, net=net: d.square().sum() - F.cross_entropy(net(x + d), labels),
            delta,
            list(net.parameters()),
            map_step=0.5,
            terms=5,
        )
        for net in nets
    ]
    direct = torch.autograd.grad(F.cross_entropy(nets[0](x + delta), labels), list(nets[0].parameters()))
    for exact, close, part in zip(*found, direct, strict=True):
        assert (exact - part).norm() > 1e-3 * part.norm()  # the second-order part is there
        assert (close - exact).norm() < 0.02 * (exact - part).norm()


def test_an_adversary_blind_to_the_parameters_adds_nothing_to_the_gradient() -> None:
    theta = nn.Parameter(torch.tensor([2.0]))
    found = hypergradient(
        lambda d: theta.square().sum() + d.sum(),
        lambda d: d.square().sum(),
        torch.ones(1),
        [theta],
        map_step=0.1,
        terms=3,
    )
    assert torch.equal(found[0], torch.tensor([4.0]))


def test_the_perturbation_is_one_step_a_batch_away_from_the_networks_answers(trained: nn.Module) -> None:
    images, _ = coloured_images(24, seed=9)
    halves = [(images[:12], torch.zeros(12)), (images[12:], torch.zeros(12))]  # the labels have no say
    delta = torch.zeros(1, 3, 16, 16)
    for half, _ in halves:
        point = delta.clone().requires_grad_(True)
        F.cross_entropy(trained(half + point), trained(half).argmax(1)).backward()
        delta = delta + 10 * (point.grad - 0.002 * delta)
    found = worst_perturbation(trained, halves, 10.0)
    torch.testing.assert_close(found, delta)
    answers = trained(images).argmax(1)
    with torch.no_grad():
        assert F.cross_entropy(trained(images + found), answers) > F.cross_entropy(trained(images), answers)


def test_unlearning_makes_the_perturbation_harmless_and_leaves_the_statistics(trained: nn.Module) -> None:
    clean = clean_images(18)
    recipe = {"rounds": 10, "portion": 0.5, "inner_lr": 100.0, "lr": 1e-3}
    defended = i_bau(trained, clean, SETTINGS, **recipe)
    delta = worst_perturbation(trained, clean.batches(64), 100.0)
    with torch.no_grad(), in_mode(trained, False):
        before = F.cross_entropy(trained(clean.images + delta), clean.labels)
        after = F.cross_entropy(defended(clean.images + delta), clean.labels)
    assert after < 0.5 * before
    for (name, wanted), found in zip(trained.named_buffers(), defended.buffers(), strict=True):
        assert torch.equal(wanted, found), name


def test_few_images_still_carry_a_perturbation(trained: nn.Module) -> None:
    """One percent of ten images is none; without a carrier the second-order part would vanish."""
    clean = clean_images(10)
    with_delta, without = (i_bau(trained, clean, SETTINGS, rounds=1, inner_lr=lr) for lr in (1000.0, 0.0))
    assert not same(snapshot(with_delta), snapshot(without))
