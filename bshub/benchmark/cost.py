"""What a method costs: seconds, peak memory, and one bare forward and backward over the same images beside it."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from bshub.clean import CleanImages

REPEATS = 3
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Cost:
    """Filled when the block ends.

    Attributes:
        seconds: Wall time.
        megabytes: Growth of the process's peak memory over what it held before; None where the system does not tell.
        cuda_megabytes: Peak of what PyTorch held on the GPU; None without one.
    """

    seconds: float = 0.0
    megabytes: float | None = None
    cuda_megabytes: float | None = None


@contextmanager
def costs() -> Iterator[Cost]:
    """Measure a block."""
    cost = Cost()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before = _resident() if _reset_peak() else None
    start = time.perf_counter()
    yield cost
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        cost.cuda_megabytes = torch.cuda.max_memory_allocated() / 1e6
    cost.seconds = time.perf_counter() - start
    peak = _read("VmHWM")
    if before is not None and peak is not None:
        cost.megabytes = max(0.0, peak - before)


def bare_step(model: nn.Module, clean: CleanImages, batch_size: int) -> float:
    """Median seconds of one forward and backward over the clean images, after one that warms up."""
    trained = copy.deepcopy(model).train()
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        for images, labels in clean.batches(max(2, batch_size)):
            if len(images) > 1:
                answer = trained(images)
                F.cross_entropy(answer if isinstance(answer, torch.Tensor) else answer[0], labels).backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _reset_peak() -> bool:
    """Let the peak start anew; only Linux can."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident() -> float | None:
    return _read("VmRSS")


def _read(field: str) -> float | None:
    """A field of the process's status in megabytes."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024 / 1e6
