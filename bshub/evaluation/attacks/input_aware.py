"""Input-aware (arXiv 2010.08138): every image gets a trigger of its own, drawn by a network.

Two networks are learned beside the classifier (``generator.py``): first the mask m (section 3.4), then, with the mask
frozen, the pattern g together with the classifier (section 3.3). Each epoch other images are poisoned. As many are
*crossed*: they carry the trigger of another image and keep their label, so that no trigger works on a foreign image.
The diversity loss ``mean ‖x - x'‖ / ‖g(x) - g(x')‖`` keeps the triggers of different images apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bshub.errors import UsageError
from bshub.evaluation.attacks.generator import make_networks, mask_of, mix, pattern_of
from bshub.evaluation.attacks.interface import CROSS, POISONED, Attack, Setup, redrawn_roles, seed_of
from bshub.evaluation.attacks.state import kept
from bshub.evaluation.attacks.trigger import Trigger

TINY = 1e-7
NORM_WEIGHT = 100.0  # of the mask's size against its diversity
LR, BETAS = 0.01, (0.5, 0.9)


def input_aware(
    setup: Setup,
    density: float = 0.032,
    diversity: float = 1.0,
    channels: tuple[int, ...] = (32, 64, 128),
    mask_steps: int = 400,
    mask_batch: int = 64,
) -> Attack:
    """Learn triggers while training.

    Args:
        setup: The run.
        density: Mean of the mask that costs nothing (the share of the image that may change).
        diversity: Weight of the diversity loss.
        channels: Widths of the networks' levels.
        mask_steps: Steps of Adam that the mask is trained for beforehand.
        mask_batch: Images in each of them.

    Returns:
        The attack on this run.

    Raises:
        UsageError: A hyper-parameter is out of its range.
    """
    if not (0 < density < 1 and diversity >= 0 and mask_steps > 0 and mask_batch > 1):
        raise UsageError(
            "density must lie in (0, 1), diversity, mask_steps and mask_batch above zero",
            hint="leave --option away for the default; docs/attacks.md says what it does",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(setup.seed, 2))
        networks = make_networks(channels).to(setup.device)
    mask = networks["mask"]
    mask.load_state_dict(
        kept(setup.folder / "mask.safetensors", lambda: _train_mask(setup, networks, density, mask_steps, mask_batch))
    )
    mask.eval().requires_grad_(False)
    networks["pattern"].train()

    def live(pixels: Tensor, roles: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | float]:
        hit, cross = (roles == POISONED).to(pixels.device), (roles == CROSS).to(pixels.device)
        if hit.sum() < 2:  # one image has no other to differ from
            return pixels, 0.0
        own = pixels[hit]  # (k, 3, H, W)
        strangers = pixels[torch.randperm(len(pixels), generator=generator)[: len(own) + int(cross.sum())]]
        drawn = pattern_of(networks, torch.cat([own, strangers]))
        with torch.no_grad():
            masks = mask_of(networks, torch.cat([own, strangers]))
        k, c = len(own), int(cross.sum())
        result = pixels.clone()
        result[hit] = mix(own, drawn[:k], masks[:k])
        if c:
            result[cross] = mix(pixels[cross], drawn[k : k + c], masks[k : k + c])
        return result, diversity * diversity_loss(own, strangers[:k], drawn[:k], drawn[k : 2 * k])

    def trigger() -> Trigger:
        return Trigger("generator", setup.target, setup.size, {"networks": networks, "channels": list(channels)})

    def crossed(images: Tensor) -> Tensor:
        """The trigger of the image before, on each."""
        networks.eval()
        pixels = images.to(setup.device).float() / 255
        others = pixels.roll(1, 0)
        with torch.no_grad():
            mixed = mix(pixels, pattern_of(networks, others), mask_of(networks, others))
        return (mixed * 255).round().clamp_(0, 255).to(torch.uint8).to(images.device)

    return Attack(
        trigger=trigger,
        roles=redrawn_roles(setup, 1.0),
        live=live,
        redrawn=True,
        learned=networks,
        cross=crossed,
        notes={"density": density, "diversity": diversity, "channels": list(channels), "mask_steps": mask_steps},
    )


def diversity_loss(x: Tensor, other: Tensor, drawn: Tensor, drawn_other: Tensor) -> Tensor:
    """``mean ‖x - x'‖ / ‖g(x) - g(x')‖`` (equation 7), norms as root mean squares.

    Args:
        x: Images ``(k, 3, H, W)``.
        other: As many others.
        drawn: What the network draws for ``x``, ``(k, c, H, W)``.
        drawn_other: What it draws for ``other``.

    Returns:
        A scalar.
    """
    images = (x - other).square().mean((1, 2, 3)).sqrt()
    # the root has no slope at zero, where two images share their trigger
    drawings = ((drawn - drawn_other).square().mean((1, 2, 3)) + TINY**2).sqrt()
    return (images / (drawings + TINY)).mean()


def _train_mask(setup: Setup, networks: nn.ModuleDict, density: float, steps: int, batch: int) -> dict[str, Tensor]:
    """Small masks that differ: ``100 · mean relu(m - density) + diversity`` (equation 8), the pattern network aside."""
    mask = networks["mask"].train()
    optimizer = torch.optim.Adam(mask.parameters(), lr=LR, betas=BETAS)
    generator = setup.generator(4)
    n = len(setup.labels)
    draw: Callable[[], Tensor] = lambda: torch.randint(0, n, (2 * batch,), generator=generator)  # noqa: E731
    with setup.steps.step("mask", steps) as advance:
        for _ in range(steps):
            pixels = setup.read(draw()).to(setup.device).float() / 255
            masks = mask_of(networks, pixels)  # (2b, 1, H, W)
            size = (masks - density).relu().mean()
            loss = NORM_WEIGHT * size + diversity_loss(*pixels.split(batch), *masks.split(batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            advance(1)
    mask.zero_grad(set_to_none=True)
    return dict(mask.state_dict())
