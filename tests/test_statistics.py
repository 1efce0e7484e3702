"""Streamed statistics against the formulas, written again here over all images at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from little_nets import Dense, Mixed, same, snapshot
from nets import randomize_batch_norm
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import find_pairs
from bshub.scoring.statistics import PairStatistics, filter_norms, measure
from bshub.scoring.stream import GRID, SHRINK, mean_correlation

SIZE = (3, 11, 9)  # not a multiple of the grid
Reading = tuple[str, Sequence[int]]  # batch norm, its channel of each filter
# convolution → the batch norms that read it, and the activation behind them
MIXED: dict[str, tuple[list[Reading], Callable[[Tensor], Tensor]]] = {
    "conv1": ([("bn1", range(8))], F.relu),
    "conv2": ([("bn2", range(8))], F.relu6),
    "conv3": ([("bn3", range(12))], lambda z: z),
}
DENSE: dict[str, tuple[list[Reading], Callable[[Tensor], Tensor]]] = {
    "conv0": ([("bn_a", range(6)), ("bn_b", range(6)), ("bn_c", range(6))], F.relu),
    "conv1": ([("bn_b", range(6, 10)), ("bn_c", range(6, 10))], F.relu),
    "conv2": ([("bn_c", range(10, 15))], F.relu),
}


@pytest.fixture(params=[(Mixed, MIXED), (Dense, DENSE)], ids=["mixed", "dense"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict]:
    torch.manual_seed(1)
    build, layers = request.param
    return randomize_batch_norm(build(), seed=3), layers


def images_and_labels(n: int = 21) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, *SIZE, generator=generator) + 0.3, torch.arange(n) % 4


def streamed(model: nn.Module, split: Sequence[int] | None) -> dict[str, PairStatistics]:
    flow, _ = follow_channels(model, SIZE)
    images, labels = images_and_labels()
    batches = None if split is None else zip(images.split(list(split)), labels.split(list(split)), strict=True)
    return measure(model, find_pairs(model, flow), batches)


def conv_outputs(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.detach()}))
        for name in names
    ]
    with torch.no_grad():
        model(images_and_labels()[0])
    for handle in handles:
        handle.remove()
    return seen


def strongest(model: nn.Module, readings: Sequence[Reading], o: int) -> tuple[float, float, float, float]:
    """γ/√(σ²+ε), shift, running mean and variance of the batch norm with the largest |γ|/√(σ²+ε)."""
    best = None
    for name, channels in readings:
        norm, c = model.get_submodule(name), channels[o]
        scale = float(norm.weight[c] / (norm.running_var[c] + norm.eps).sqrt())
        shift = float(norm.bias[c]) - scale * float(norm.running_mean[c])
        if best is None or abs(scale) > abs(best[0]):
            best = (scale, shift, float(norm.running_mean[c]), float(norm.running_var[c]))
    assert best is not None
    return best


@pytest.mark.parametrize("split", [[21], [1] * 21, [8, 8, 5], [2, 19], [20, 1]], ids=str)
def test_spectral_is_the_largest_singular_value_times_the_batch_norms_gain(case: tuple, split: list[int]) -> None:
    model, layers = case
    measured = streamed(model, split)
    assert measured.keys() == layers.keys()
    for name, (readings, _) in layers.items():
        weight = model.get_submodule(name).weight.detach()
        wanted = [
            float(torch.linalg.svd(weight[o].flatten(1)).S[0]) * abs(strongest(model, readings, o)[0])
            for o in range(len(weight))
        ]
        torch.testing.assert_close(measured[name].spectral, torch.tensor(wanted), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("split", [[21], [1] * 21, [8, 8, 5]], ids=str)
def test_saliency_is_the_mean_magnitude_of_autograds_gradient(case: tuple, split: list[int]) -> None:
    model, layers = case
    images, labels = images_and_labels()
    weights = [model.get_submodule(name).weight for name in layers]
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), weights)
    measured = streamed(model, split)
    for name, gradient in zip(layers, gradients, strict=True):
        wanted = torch.stack([g.abs().mean() for g in gradient])
        torch.testing.assert_close(measured[name].saliency, wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("split", [[21], [1] * 21, [8, 8, 5]], ids=str)
def test_activation_is_the_mean_root_mean_square_of_the_normalised_map(case: tuple, split: list[int]) -> None:
    model, layers = case
    outputs, measured = conv_outputs(model, list(layers)), streamed(model, split)
    for name, (readings, act) in layers.items():
        for o in range(outputs[name].shape[1]):
            scale, shift, _, _ = strongest(model, readings, o)
            maps = act(outputs[name][:, o] * scale + shift)  # (n, h, w)
            wanted = sum(float(m.norm()) / m.numel() ** 0.5 for m in maps) / len(maps)
            assert measured[name].activation is not None
            assert float(measured[name].activation[o]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("split", [[21], [1] * 21, [8, 8, 5], [20, 1]], ids=str)
def test_correlation_is_numpys_corrcoef_on_the_pooled_maps(case: tuple, split: list[int]) -> None:
    model, layers = case
    outputs, measured = conv_outputs(model, list(layers)), streamed(model, split)
    for name in layers:
        pooled = F.adaptive_avg_pool2d(outputs[name], GRID).double().numpy()
        rows = pooled.transpose(1, 0, 2, 3).reshape(pooled.shape[1], -1)
        pearson = np.abs(np.corrcoef(rows))
        wanted = (pearson.sum(1) - 1) / (len(rows) - 1)
        np.testing.assert_allclose(measured[name].correlation.numpy(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("split", [[21], [1] * 21, [8, 8, 5], [20, 1]], ids=str)
def test_bn_shift_is_the_kl_divergence_from_the_running_statistics(case: tuple, split: list[int]) -> None:
    model, layers = case
    outputs, measured = conv_outputs(model, list(layers)), streamed(model, split)
    n = len(images_and_labels()[0])
    for name, (readings, _) in layers.items():
        for o in range(outputs[name].shape[1]):
            z = outputs[name][:, o].double().numpy()
            _, _, mean, variance = strongest(model, readings, o)
            ours, theirs = z.var() + 1e-5, variance + 1e-5
            kl = 0.5 * (np.log(theirs / ours) + (ours + (z.mean() - mean) ** 2) / theirs - 1)
            assert measured[name].bn_shift is not None
            assert float(measured[name].bn_shift[o]) == pytest.approx(kl * n / (n + SHRINK), rel=1e-3, abs=1e-5)


def test_weights_alone_give_the_same_spectral_and_nothing_else(case: tuple) -> None:
    model, layers = case
    alone, full = streamed(model, None), streamed(model, [21])
    for name in layers:
        assert torch.equal(alone[name].spectral, full[name].spectral)
        assert alone[name].saliency is alone[name].activation is alone[name].correlation is alone[name].bn_shift is None


@pytest.mark.parametrize("training", [False, True])
def test_measuring_leaves_the_model_as_it_was(case: tuple, training: bool) -> None:
    model, _ = case
    model.train(training)
    list(model.children())[1].eval()  # a mixture of modes, and of flags, has to survive as well
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    streamed(model, [8, 8, 5])
    assert same(before, snapshot(model))


def test_a_failing_loader_leaves_the_model_as_it_was() -> None:
    model = randomize_batch_norm(Mixed())
    before = snapshot(model)
    flow, _ = follow_channels(model, SIZE)

    def batches():
        yield images_and_labels()
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        measure(model, find_pairs(model, flow), batches())
    assert same(before, snapshot(model))


def test_statistics_are_float32_on_the_cpu_and_one_per_filter(case: tuple) -> None:
    model, layers = case
    for name, found in streamed(model, [10, 11]).items():
        for value in (
            value for key, value in vars(found).items() if key not in ("taylor", "tac")
        ):  # only where asked for
            assert (value.dtype, value.device.type) == (torch.float32, "cpu"), name
            assert value.shape == (model.get_submodule(name).out_channels,)
            assert torch.isfinite(value).all()
    assert layers


def test_progress_counts_every_image_once() -> None:
    model, seen = randomize_batch_norm(Mixed()), []
    flow, _ = follow_channels(model, SIZE)
    images, labels = images_and_labels()
    measure(model, find_pairs(model, flow), zip(images.split(8), labels.split(8), strict=True), progress=seen.append)
    assert seen == [8, 8, 5]


@pytest.mark.parametrize(
    "shape", [(5, 3, 3, 3), (5, 1, 3, 3), (5, 16, 1, 1), (5, 2, 1, 7), (5, 40, 3, 3), (5, 13, 3, 3), (4, 3, 5)]
)
def test_filter_norms_match_the_singular_values_of_every_shape(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    wanted = torch.stack([torch.linalg.matrix_norm(w.flatten(1), 2) for w in weight])
    torch.testing.assert_close(filter_norms(weight), wanted, rtol=1e-5, atol=1e-7)


def test_a_constant_filter_correlates_with_nothing_and_a_twin_fully() -> None:
    rows = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).double()
    x = torch.stack([rows[0], -2 * rows[0], torch.full((500,), 3.0).double()])
    centred = (x - x.mean(1, keepdim=True)).float()
    wanted = torch.tensor([0.5, 0.5, 0.0])  # 1 with the twin, 0 with the constant
    torch.testing.assert_close(mean_correlation(centred @ centred.T), wanted)
    assert mean_correlation(torch.ones(1, 1)).tolist() == [0.0]


def test_correlation_survives_a_mean_far_from_zero() -> None:
    """Sums of squares would cancel; the pairwise update does not."""
    model = randomize_batch_norm(Mixed())
    near = streamed(model, [1] * 21)["conv1"].correlation
    with torch.no_grad():
        model.conv1.bias.add_(1000.0)
        model.bn1.running_mean.add_(1000.0)
    far = streamed(model, [1] * 21)["conv1"].correlation
    torch.testing.assert_close(far, near, rtol=0.01, atol=0.01)
