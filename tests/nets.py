"""Small real networks for the tests, and an oracle of surgery that does not use the library's own masking."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bshub.graph.channels import Ints
from bshub.graph.coupling import ChannelFlow, follow_channels
from bshub.graph.pairs import Pairing, find_pairs
from bshub.scoring.plan import RemovalPlan
from bshub.surgery.remove import Removal, remove

Flags = Mapping[str, Ints]


def randomize_batch_norm(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine numbers as a trained net has them, in place: fresh 0/1 would hide wrong surgery."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            mean.copy_(torch.randn(mean.shape, generator=generator) * 0.2)
            var.copy_(torch.rand(var.shape, generator=generator) + 0.5)
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(weight, Tensor) and isinstance(bias, Tensor):
                weight.data.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
                bias.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval()


class Net:
    """A network with its channels, its pairs and images of its size."""

    def __init__(self, model: nn.Module, size: int = 16, inputs: int = 3) -> None:
        self.model = randomize_batch_norm(model)
        self.size = (inputs, size, size)
        self.flow: ChannelFlow = follow_channels(model, self.size)[0]
        self.pairing: Pairing = find_pairs(model, self.flow)
        self.images = torch.randn(4, *self.size, generator=torch.Generator().manual_seed(1))

    def flags(self, fraction: float, seed: int = 0) -> dict[str, Ints]:
        """A random share of the paired filters of each convolution."""
        rng = np.random.default_rng(seed)
        chosen = {}
        for pair in self.pairing.pairs:
            index = np.flatnonzero(pair.paired)
            chosen[pair.name] = index[rng.random(len(index)) < fraction]
        return chosen

    def remove(self, flagged: Mapping[str, object]) -> Removal:
        """Surgery by the library."""
        arrays = {name: np.asarray(index, np.int64) for name, index in flagged.items()}
        return remove(self.model, self.flow, self.pairing, arrays, self.images)

    def remove_exactly(self, flagged: Mapping[str, object]) -> Removal:
        """Surgery by the library, held against the oracle."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        removal = self.remove(flagged)
        assert all(torch.equal(before[name], tensor) for name, tensor in self.model.state_dict().items())
        assert_equals_masked(self, removal)
        for name, index in flagged.items():
            gone = removal.plan.removed.get(name, []) + removal.plan.silenced.get(name, [])
            assert sorted(gone) == sorted(np.asarray(index).tolist()), name
        return removal


def _zeroed(x: Tensor, axis: int, index: list[int]) -> tuple[Tensor]:
    keep = torch.ones(x.shape[axis])
    keep[index] = 0
    return (x * keep.to(x.dtype).view([-1 if dim == axis else 1 for dim in range(x.ndim)]),)


def masked_by_hand(net: Net, plan: RemovalPlan) -> nn.Module:
    """The original whose consumers get zeros where the narrowed model gets nothing.

    What a consumer loses is read off the difference between its full input axis and ``plan.kept``; the zeros are
    written into its *input*, not into its weights.
    """
    masked = silenced_by_hand(net, plan.silenced)
    for name, module in masked.named_modules():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        if name in plan.refilled:  # it slides along the channels: no column of its weight is theirs
            axis, width, kept = plan.refilled[name]
            away = sorted(set(range(width)) - set(kept))
            module.register_forward_pre_hook(lambda m, args, away=away, axis=axis: _zeroed(args[0], axis, away))
            continue
        transposed = isinstance(module, _ConvTransposeNd)
        groups = getattr(module, "groups", 1)
        if groups > 1 and module.weight.shape[1] == 1:
            continue  # a depthwise convolution mixes nothing: its channels leave at their consumer
        axis = 0 if transposed else 1
        size = module.weight.shape[axis]
        kept = plan.kept.get(f"{name}.weight", {}).get(axis)
        if kept is None:
            continue
        lost = sorted(set(range(size)) - set(kept))
        if not transposed:
            lost = [group * size + k for group in range(groups) for k in lost]
        dim = 1 if isinstance(module, _ConvNd) else -1

        def hide(module: nn.Module, args: tuple[Tensor], lost: list[int] = lost, dim: int = dim) -> tuple[Tensor]:
            return (args[0].clone().index_fill_(dim, torch.tensor(lost), 0),)

        module.register_forward_pre_hook(hide)
    return masked


def silenced_by_hand(net: Net, filters: Mapping[str, object]) -> nn.Module:
    """The paper's pruning: the filter's row and bias, its batch norm's scale and shift, all zero."""
    masked = copy.deepcopy(net.model).eval()
    tensors = dict(masked.named_parameters(remove_duplicate=False))
    pairs = {pair.name: pair for pair in (*net.pairing.pairs, *net.pairing.bare)}
    for name, index in filters.items():
        chosen = torch.as_tensor(np.asarray(index, np.int64))

        def hush(module: nn.Module, args: object, out: Tensor, chosen: Tensor = chosen) -> Tensor:
            return out.index_fill(1, chosen, 0)  # a zero row and a zero bias

        masked.get_submodule(name).register_forward_hook(hush)
        for reader in pairs[name].readers:
            channels = reader.channels[np.isin(reader.filters, chosen)]
            tensors[reader.norm.weight].data[channels] = 0
            tensors[reader.norm.bias].data[channels] = 0
    return masked


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The answer in evaluation mode."""
    with torch.no_grad():
        return model.eval()(images)


def relative_error(ours: nn.Module, theirs: nn.Module, images: Tensor) -> float:
    """``max |ours - theirs| / max |theirs|``."""
    a, b = logits(ours, images), logits(theirs, images)
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def assert_equals_masked(net: Net, removal: Removal) -> None:
    """Narrowed equals masked in both precisions, and the narrowed model is no larger."""
    masked = masked_by_hand(net, removal.plan)
    assert relative_error(removal.model, masked, net.images) < 1e-5
    double = copy.deepcopy(removal.model).double(), masked.double()
    assert relative_error(*double, net.images.double()) < 1e-6
    assert parameters(removal.model) <= parameters(net.model)


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, *, groups: int = 1, act: type[nn.Module] = nn.ReLU, bias: bool = False
) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


def head(channels: int, classes: int = 5) -> nn.Sequential:
    """Global pooling and a classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Residual(nn.Module):
    """``relu(x + body(x))``."""

    def __init__(self, body: nn.Module, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.body, self.act = body, act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.body(x))


class Concat(nn.Module):
    """The branches' outputs side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, reduced: int, gate: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(self.down(x.mean((2, 3), keepdim=True)).relu()))


class Shuffle(nn.Module):
    """Channel shuffle over ``groups``."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Halves(nn.Module):
    """The first half of the channels passes, the second goes through ``body``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([first, self.body(second)], 1)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


class Auxiliary(nn.Module):
    """Two classifiers in training, one in evaluation, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.aux = nn.Sequential(conv_bn(12, 8, 1), head(8))
        self.body = conv_bn(12, 10)
        self.head = head(10)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        aux = self.aux(x) if self.training else None
        x = self.head(self.body(x))
        return x if aux is None else (x, aux)


def residual_net(width: int = 8, blocks: int = 2) -> nn.Sequential:
    """A stem, identity blocks, a head."""

    def body() -> nn.Sequential:
        return nn.Sequential(conv_bn(width, width), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))

    return nn.Sequential(conv_bn(3, width), *(Residual(body()) for _ in range(blocks)), head(width))


def vgg_like() -> nn.Sequential:
    """Convolutions with bias, pooling, a flattened map into two linear layers."""
    return nn.Sequential(
        conv_bn(3, 8, bias=True),
        nn.MaxPool2d(2),
        conv_bn(8, 12, bias=True),
        nn.MaxPool2d(2),
        conv_bn(12, 10, bias=True),
        nn.Flatten(),
        nn.Linear(10 * 16, 14),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(14, 5),
    )
