"""Tiny networks and images whose every number a test can compute by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mixed(nn.Module):
    """3x3 with bias, depthwise, 1x1; ReLU, ReLU6 and no activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) → (n, 4)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu6(self.bn2(self.conv2(x)))
        return self.fc(self.bn3(self.conv3(x)).mean((2, 3)))


class Dense(nn.Module):
    """DenseNet's growth: ``conv0`` is read by three batch norms, ``conv1`` by two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn_a, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, bias=False)
        self.bn_b, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 3, padding=1, bias=False)
        self.bn_c, self.fc = nn.BatchNorm2d(15), nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) → (n, 4)."""
        a = self.conv0(x)
        b = torch.cat([a, self.conv1(F.relu(self.bn_a(a)))], 1)
        c = torch.cat([b, self.conv2(F.relu(self.bn_b(b)))], 1)
        return self.fc(F.relu(self.bn_c(c)).mean((2, 3)))


class Residual(nn.Module):
    """A stem, one residual block whose channels are shared, and a free inner convolution."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) → (n, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))))
        return self.fc(x.mean((2, 3)))


class WithoutNorm(nn.Module):
    """Nothing to judge filters by."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) → (n, 3)."""
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


def coloured_images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``n`` noisy 16x16 images of three classes, told apart by their strongest colour."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randn(n, 3, 16, 16, generator=generator) * 0.5
    images[torch.arange(n), labels] += 1.0
    return images, labels


def train(
    model: nn.Module,
    steps: int = 60,
    seed: int = 0,
    batch: Callable[[int], tuple[Tensor, Tensor]] = lambda seed: coloured_images(48, seed),
) -> nn.Module:
    """A few steps, on the coloured images or others, so that statistics and accuracy are those of a trained net."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for step in range(steps):
        images, labels = batch(seed + step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that must stay as it was: tensors, flags, modes."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "grads": {name: parameter.grad is None for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
    }


def same(before: dict[str, object], after: dict[str, object]) -> bool:
    """Whether two snapshots agree bit for bit."""
    tensors, others = before["state"], after["state"]
    assert isinstance(tensors, dict)
    assert isinstance(others, dict)
    equal = tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    return equal and all(before[key] == after[key] for key in before if key != "state")
