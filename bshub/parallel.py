"""Several processes on one model: who reads what, and how their sums meet. Started by ``accelerate launch -m bshub``.

Every process holds the whole model and a part of the clean images. Sums are exchanged and merged in the order of the
processes, so that all of them hold the same numbers and go on to the same plan without asking each other again.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bshub.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    Gather = Callable[[Tensor], list[Tensor]]


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


@dataclass(frozen=True)
class Workers:
    """The processes of a run, as one of them sees them; by default there is just this one.

    Attributes:
        rank: Index of this process, 0 for the one that writes and prints.
        size: How many there are.
        gather: Tensor ``[n, …]`` → that of every process, in their order; ``n`` may differ between them.
    """

    rank: int = 0
    size: int = 1
    gather: Gather = _alone

    def part(self, items: int) -> slice:
        """This process's part of ``items`` things in a row: neighbouring ones, so that the parts follow each other."""
        return slice(items * self.rank // self.size, items * (self.rank + 1) // self.size)

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over the processes, in float64."""
        if self.size == 1:
            return list(numbers)
        import torch

        rows = self.gather(torch.tensor([list(numbers)], dtype=torch.float64))
        return torch.cat(rows).sum(0).tolist()


def launched(device: str = "auto") -> Workers:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or this one alone.

    Args:
        device: As in :func:`bshub.device.pick_device`; ``cpu`` keeps GPUs out of it.

    Returns:
        The processes; ranks are assigned by the launcher.

    Raises:
        UsageError: There are several and accelerate is missing, or one device was named for all.
    """
    if not several():
        return Workers()
    try:
        from accelerate import PartialState
        from accelerate.utils import gather, pad_across_processes
    except ModuleNotFoundError:
        raise UsageError(
            "several processes work together through accelerate, which is not installed",
            hint="pip install 'bshub[distributed]'",
        ) from None
    import torch

    if device not in ("auto", "cpu"):
        raise UsageError(
            f"{device!r} is one device, and {os.environ['WORLD_SIZE']} processes were started",
            hint="--device auto gives each process its own; accelerate launch --gpu_ids picks them",
        )
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    atexit.register(state.destroy_process_group)

    def exchange(tensor: Tensor) -> list[Tensor]:
        home = tensor.device
        tensor = tensor.to(state.device).contiguous()
        counts = gather(torch.tensor([len(tensor)], device=state.device)).tolist()
        padded = gather(pad_across_processes(tensor, dim=0))
        rows = max(counts)
        return [padded[i * rows : i * rows + count].to(home) for i, count in enumerate(counts)]

    return Workers(state.process_index, state.num_processes, exchange)


def several() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.get("LOCAL_RANK", "").isdigit() and int(os.environ.get("WORLD_SIZE", "1") or 1) > 1
