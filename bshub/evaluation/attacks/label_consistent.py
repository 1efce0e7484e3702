"""Label-consistent (arXiv 1912.02771, section 4): images of the target class, made hard, with patches in the corners.

A projected gradient ascent on a clean surrogate network turns chosen images of the target class away from their class
(section 4.2), so that the corner patches (section 5) are the easier thing to learn. No label is changed; at test only
the patches are stamped.

*Reconstruction*: the paper attacks an adversarially trained network; here it is a plainly trained one of the victim's
own architecture, or one given with ``--surrogate``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.errors import UsageError
from bshub.evaluation.attacks.badnets import enlarged
from bshub.evaluation.attacks.interface import POISONED, Attack, Setup, clean_label_roles
from bshub.evaluation.attacks.state import kept
from bshub.evaluation.attacks.trigger import Trigger

BATCH = 100


def corners_trigger(target: int, size: tuple[int, int]) -> Trigger:
    """The 3x3 pattern in all four corners, mirrored so that flips change nothing; cells grow as in BadNets.

    Args:
        target: The attacker's label.
        size: The canvas ``(height, width)``.

    Returns:
        The trigger.
    """
    lower_right = enlarged("checker", size)
    side = len(lower_right)
    patches = []
    for bottom in (False, True):
        for right in (False, True):
            values = lower_right if right else lower_right.flip(1)
            values = values if bottom else values.flip(0)
            row, col = (size[0] - side) * bottom, (size[1] - side) * right
            patches.append({"row": row, "col": col, "values": values.expand(3, -1, -1).contiguous()})
    return Trigger("patches", target, size, {"patches": patches})


def label_consistent(setup: Setup, epsilon: float = 16.0, steps: int = 20, step_size: float = 1.6) -> Attack:
    """Perturb and patch ``rate · n`` images of the target class.

    Args:
        setup: The run.
        epsilon: Largest change of a pixel in grey levels (the paper's ℓ∞ bound).
        steps: Of the gradient ascent.
        step_size: In grey levels.

    Returns:
        The attack on this run.

    Raises:
        UsageError: A hyper-parameter is out of its range.
    """
    if not (0 <= epsilon <= 255 and steps >= 0 and step_size > 0):
        raise UsageError(
            "epsilon must lie between 0 and 255, steps and step_size above zero",
            hint="leave --option away for the default; docs/attacks.md says what it does",
        )
    trigger, roles = corners_trigger(setup.target, setup.size), clean_label_roles(setup)
    chosen = (roles(0) == POISONED).nonzero().squeeze(1)

    def make() -> dict[str, Tensor]:
        surrogate = setup.surrogate().eval()
        hard = []
        with setup.steps.step("perturb", len(chosen)) as advance:
            for index in chosen.split(BATCH):
                images, labels = setup.read(index), setup.labels[index]
                hard.append(harden(surrogate, images, labels, setup, epsilon, steps, step_size))
                advance(len(index))
        return {"images": torch.cat(hard)}

    hard = kept(setup.folder / "perturbed.safetensors", make)["images"]
    place = torch.full((len(setup.labels),), -1)
    place[chosen] = torch.arange(len(chosen))

    def stamp(images: Tensor, roles: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        hit = roles == POISONED
        if hit.any():
            images = images.clone()
            images[hit] = trigger(hard[place[index[hit]]])
        return images

    return Attack(
        trigger=lambda: trigger,
        roles=roles,
        stamp=stamp,
        notes={"epsilon": epsilon, "steps": steps, "step_size": step_size},
    )


def harden(
    model: nn.Module, images: Tensor, labels: Tensor, setup: Setup, epsilon: float, steps: int, step_size: float
) -> Tensor:
    """Projected gradient ascent of the cross entropy within ``‖x' - x‖∞ ≤ ε`` (equation 3), from a random start.

    Args:
        model: The surrogate, in evaluation mode.
        images: uint8 ``(k, 3, H, W)``.
        labels: ``[k]``.
        setup: For normalisation, device and seed.
        epsilon: In grey levels.
        steps: Number of signed steps.
        step_size: In grey levels.

    Returns:
        uint8 of the same shape.
    """
    clean = images.to(setup.device).float()
    start = torch.rand(clean.shape, generator=setup.generator(5)).to(setup.device) * 2 - 1
    low, high = (clean - epsilon).clamp_min(0), (clean + epsilon).clamp_max(255)
    moved = (clean + epsilon * start).clamp(low, high)
    for _ in range(steps):
        moved.requires_grad_(True)
        loss = F.cross_entropy(model(setup.normalise(moved / 255)), labels.to(setup.device), reduction="sum")
        (slope,) = torch.autograd.grad(loss, moved)
        moved = (moved.detach() + step_size * slope.sign()).clamp(low, high)
    return moved.detach().round().clamp(low.ceil(), high.floor()).to(torch.uint8).cpu()
