"""The two networks of the input-aware attack (arXiv 2010.08138, section 3): one draws a pattern, one a mask.

``B(x) = x · (1 - m(x)) + g(x) · m(x)`` on pixels in 0…1, x shown to both networks as -1…1. Both are the same small
encoder-decoder, ``len(channels)`` levels deep: two 3x3 convolutions with batch norm and ReLU a level, max pooling down,
bilinear interpolation up to the very size that was pooled, so that any canvas works. ``tanh`` bounds the output; the
mask's is steepened by 20, which makes it nearly binary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

MAX_FILE = 64 * 2**20  # bytes
MAX_LEVELS, MAX_WIDTH = 6, 512
CHUNK_PIXELS = 2**20  # pixels of one forward pass
FILE = "generator.safetensors"
STEEP = 20.0


class EncoderDecoder(nn.Module):
    """``(n, 3, H, W)`` in -1…1 → ``(n, outputs, H, W)``, unbounded.

    Args:
        outputs: Channels of the answer.
        channels: Width of each level.
    """

    def __init__(self, outputs: int, channels: Sequence[int]) -> None:
        super().__init__()
        widths = [3, *channels]
        self.down = nn.ModuleList(_level(a, b) for a, b in pairwise(widths))
        self.middle = _conv(channels[-1], channels[-1])
        ups = list(reversed(channels))
        self.up = nn.ModuleList(_level(a, b) for a, b in zip(ups, [*ups[1:], ups[-1]], strict=True))
        self.last = nn.Conv2d(ups[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Draw."""
        sizes = []
        for level in self.down:
            x = level(x)
            sizes.append(x.shape[2:])
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = self.middle(x)
        for level, size in zip(self.up, reversed(sizes), strict=True):
            x = level(F.interpolate(x, size=size, mode="bilinear", align_corners=True))
        return self.last(x)


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs, momentum=0.05), nn.ReLU(inplace=True)
    )


def _level(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*_conv(inputs, outputs), *_conv(outputs, outputs))


def make_networks(channels: Sequence[int]) -> nn.ModuleDict:
    """``pattern`` and ``mask``, freshly initialised."""
    return nn.ModuleDict({"pattern": EncoderDecoder(3, channels), "mask": EncoderDecoder(1, channels)})


def pattern_of(networks: nn.ModuleDict, pixels: Tensor) -> Tensor:
    """``g(x)``: ``(n, 3, H, W)`` in 0…1 for pixels in 0…1."""
    return networks["pattern"](pixels * 2 - 1).tanh() / 2 + 0.5


def mask_of(networks: nn.ModuleDict, pixels: Tensor) -> Tensor:
    """``m(x)``: ``(n, 1, H, W)`` in 0…1 for pixels in 0…1."""
    squashed = networks["mask"](pixels * 2 - 1).tanh() / 2 + 0.5
    return (STEEP * squashed - STEEP / 2).tanh() / 2 + 0.5


def mix(pixels: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """``x + (g - x) · m``."""
    return pixels + (pattern - pixels) * mask


def apply_generator(images: Tensor, params: dict[str, Any]) -> Tensor:
    """uint8 ``[n, 3, H, W]`` → uint8, each image with the trigger that the networks draw for it."""
    networks = params["networks"]
    size = max(1, CHUNK_PIXELS // (images.shape[2] * images.shape[3]))
    device = next(networks.parameters()).device
    done = [images[:0]]
    was = networks.training
    networks.eval()
    with torch.no_grad():
        for part in images.split(size):
            pixels = part.to(device).float() / 255
            mixed = mix(pixels, pattern_of(networks, pixels), mask_of(networks, pixels))
            done.append((mixed * 255).round().clamp_(0, 255).to(torch.uint8).to(images.device))
    networks.train(was)
    return torch.cat(done)


def read_generator(path: Path, channels: Any) -> dict[str, Any]:
    """Read the networks back.

    Raises:
        ValueError: Not a safetensors file, too large, or no such networks.
        CheckpointError: The bytes are not admissible or do not fit.
    """
    from bshub.intake.checkpoint import load_into, read_checkpoint, sniff

    widths = list(channels)
    if not 0 < len(widths) <= MAX_LEVELS or not all(type(w) is int and 0 < w <= MAX_WIDTH for w in widths):
        raise ValueError(f"channels must be 1 to {MAX_LEVELS} whole numbers up to {MAX_WIDTH}")
    if path.is_fifo():
        raise ValueError(f"{path.name} is not a plain file")
    with path.open("rb") as stream:
        if path.stat().st_size > MAX_FILE or sniff(stream.read(512), path.name) != "safetensors":
            raise ValueError(f"{path.name} must be a safetensors file of at most {MAX_FILE // 2**20} MiB")
    networks = make_networks(widths)
    load_into(networks, read_checkpoint(path), origin=path.name)
    return {"networks": networks.eval(), "channels": widths}


def write_generator(params: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the networks beside ``trigger.json``; returns what the JSON says of them."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in params["networks"].state_dict().items()}
    save_file(state, folder / FILE, metadata={"format": "pt"})
    (folder / FILE).chmod(0o644)
    return {"file": FILE, "channels": list(params["channels"])}
