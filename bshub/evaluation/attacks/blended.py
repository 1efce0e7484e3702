"""Blended (arXiv 1712.05526, section 3.2.2): a whole picture, faintly mixed into every poisoned image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bshub.errors import UsageError, choices
from bshub.evaluation.attacks.interface import Attack, Setup, dirty_roles, stamp_with
from bshub.evaluation.attacks.trigger import Trigger

WAVES, SHAPES = 4, 5
MAX_CYCLES = 2.5  # across the canvas


def blended(setup: Setup, alpha: float = 0.2, pattern: str = "picture") -> Attack:
    """Mix ``Π(p, x) = α · p + (1 - α) · x`` into ``rate · n`` images of the other classes and relabel them.

    Args:
        setup: The run.
        alpha: Share of the pattern, in (0, 1].
        pattern: ``picture``, smooth colours and shapes with the spectrum of a photograph, or ``noise``, uniform noise
            (the paper's "random pattern").

    Returns:
        The attack on this run.

    Raises:
        UsageError: There is no such pattern, or ``alpha`` is out of its range.
    """
    if pattern not in PATTERNS:
        raise UsageError(f"unknown pattern {pattern!r}", hint=choices(pattern, PATTERNS))
    if not 0 < alpha <= 1:
        raise UsageError(
            f"alpha must lie in (0, 1], not {alpha!r}",
            hint="leave --option away for the default; docs/attacks.md says what it does",
        )
    image = PATTERNS[pattern](setup.size, setup.generator(2))
    trigger = Trigger("blend", setup.target, setup.size, {"pattern": image, "alpha": float(alpha)})
    return Attack(
        trigger=lambda: trigger,
        roles=dirty_roles(setup),
        stamp=stamp_with(trigger),
        notes={"alpha": alpha, "pattern": pattern},
    )


def picture(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A seeded drawing: a sky of slow colour waves, ellipses of one colour each before it.

    Args:
        size: ``(height, width)``; the drawing is the same at every size.
        generator: Source of its colours, places and sizes.

    Returns:
        uint8 ``(3, height, width)``.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    height, width = size
    y = ((torch.arange(height) + 0.5) / height).view(1, -1, 1)  # (1, H, 1)
    x = ((torch.arange(width) + 0.5) / width).view(1, 1, -1)  # (1, 1, W)
    drawing = uniform(3, 1, 1).expand(3, height, width).clone() * 0.5 + 0.25
    for _ in range(WAVES):
        fy, fx, phase = (MAX_CYCLES * (uniform(1) * 2 - 1), MAX_CYCLES * (uniform(1) * 2 - 1), uniform(1))
        wave = torch.cos(2 * math.pi * (fy * y + fx * x + phase))  # (1, H, W)
        drawing += 0.2 * (uniform(3, 1, 1) * 2 - 1) * wave
    for _ in range(SHAPES):
        cy, cx, ry, rx, angle = (*uniform(2).tolist(), *(0.06 + 0.2 * uniform(2)).tolist(), math.pi * float(uniform(1)))
        u = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
        v = (y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)
        inside = (u / rx).square() + (v / ry).square() < 1  # (1, H, W)
        drawing = torch.where(inside, uniform(3, 1, 1), drawing)
    return (drawing.clamp(0, 1) * 255).round().to(torch.uint8)


def noise(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Independent uniform grey levels, uint8 ``(3, height, width)``.

    Args:
        size: ``(height, width)``.
        generator: Source of the levels.

    Returns:
        uint8 ``(3, height, width)``.
    """
    return torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)


PATTERNS = {"picture": picture, "noise": noise}
