"""Images made up where there are none: dead leaves, which look like nothing and have the statistics of photographs.

Discs and boxes of random place, size, tilt and colour are laid over each other, sizes by a power law, as Lee, Mumford
and Huang (*Occlusion models for natural images*, IJCV 2001) explain the edges of photographs; noise whose spectrum
falls as ``1 / f`` gives them texture. Networks learn useful filters from such images alone (Baradad et al.,
*Learning to see by looking at noise*, NeurIPS 2021). What a trigger does, it does to them as well: a patch or a blend
does not ask what it lies on. Their labels are the model's own answers, so a rate on them is agreement, not accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bshub.intake.preprocessing import Preprocessing

COUNT = 256  # half of them may be answered with the target of a backdoor, and say nothing then
PART = 64  # images that are drawn at a time: what is drawn takes several times their memory
LEAVES = 40  # per image; few enough that some of the first stay visible
SMALLEST, LARGEST = 0.03, 0.53  # half the size of a leaf, of the image's side
LUMINANCE, HUE = 0.06, 0.03  # deviation of the texture, the same in all channels and apart in each
COLOUR = 0.18  # deviation of a channel from the leaf's brightness


class StandIns:
    """Made-up images in the place of clean ones: ``sanitize(model, StandIns((3, 224, 224)))``.

    Args:
        input_size: ``(channels, height, width)``.
        mean: What the model's preprocessing takes off each channel, of images between 0 and 1; None: the mean of
            these images, which is what a data set normalised by its own numbers has.
        std: What it divides each channel by; None likewise.
        count: How many images.
        seed: Of everything random.
        batch_size: Images per batch.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        count: int = COUNT,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        self.input_size, self.count = input_size, count
        self._mean, self._std, self._seed, self._batch_size = mean, std, seed, batch_size

    @classmethod
    def like(cls, preprocessing: Preprocessing, *, seed: int = 0, batch_size: int = 32) -> StandIns:
        """As a loaded model expects its images.

        Args:
            preprocessing: The model's own.
            seed: Of everything random.
            batch_size: Images per batch.

        Returns:
            The usual number of them.
        """
        config = preprocessing.config
        return cls(preprocessing.input_size, config["mean"], config["std"], seed=seed, batch_size=batch_size)

    def __len__(self) -> int:
        """How many images."""
        return self.count

    def answered_by(self, model: nn.Module, part: slice = slice(None)) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches with the model's own answers for labels.

        Args:
            model: In evaluation mode.
            part: Which of them.

        Yields:
            Images ``[n, c, h, w]``, normalised, and labels ``[n]``, on the model's device.
        """
        place = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        for batch in self.normalised()[part].split(self._batch_size):
            batch = batch.to(place)
            with torch.no_grad():
                yield batch, model(batch).argmax(1)

    def normalised(self) -> Tensor:
        """All of them, ``[count, c, h, w]``, as the model expects its images."""
        images = dead_leaves(self.count, self.input_size, self._seed)
        mean = images.mean((0, 2, 3)) if self._mean is None else torch.tensor(self._mean)
        std = images.std((0, 2, 3)) if self._std is None else torch.tensor(self._std)
        return (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def dead_leaves(count: int, size: tuple[int, int, int], seed: int) -> Tensor:
    """Leaves over each other, with texture.

    Args:
        count: How many images.
        size: ``(channels, height, width)``.
        seed: The same gives the same images.

    Returns:
        ``[count, channels, height, width]``, between 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [min(PART, count - start) for start in range(0, count, PART)]
    return torch.cat([_leaves(part, size, generator) for part in parts])


def _leaves(count: int, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    channels, height, width = size

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    rows = torch.linspace(0, height / max(height, width), height).view(1, -1, 1)
    columns = torch.linspace(0, width / max(height, width), width).view(1, 1, -1)
    images = uniform(0.2, 0.8).unsqueeze(1).expand(count, channels, height, width).clone()
    for _ in range(LEAVES):
        half = SMALLEST + (LARGEST - SMALLEST) * uniform(0, 1) ** 3
        tilt, slim = uniform(0, math.pi), uniform(0.4, 1)
        right, down = columns - uniform(0, 1), rows - uniform(0, 1)
        along = (right * tilt.cos() + down * tilt.sin()) / half
        across = (down * tilt.cos() - right * tilt.sin()) / (half * slim)
        disc, box = along.square() + across.square() < 1, (along.abs() < 1) & (across.abs() < 1)
        leaf = torch.where(uniform(0, 1) < 0.6, disc, box).unsqueeze(1)
        spread = COLOUR * torch.randn(count, channels, 1, 1, generator=generator)
        images = torch.where(leaf, (uniform(0, 1).unsqueeze(1) + spread).clamp(0, 1), images)
    images += LUMINANCE * _pink(count, 1, height, width, generator)
    images += HUE * _pink(count, channels, height, width, generator)
    return images.clamp(0, 1)


def _pink(count: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Noise with amplitude ``1 / f``, mean 0 and deviation 1 in every channel."""
    noise = torch.randn(count, channels, height, width, generator=generator)
    frequency = (torch.fft.fftfreq(height).view(-1, 1).square() + torch.fft.rfftfreq(width).square()).sqrt()
    frequency[0, 0] = math.inf  # no mean
    shaped = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(height, width))
    return shaped / shaped.std((2, 3), correction=0, keepdim=True).clamp_min(1e-12)
