"""What looking costs: statistics, scores and plan beside one bare forward and backward; spectral norms beside SVDs."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.benchmark.cost import costs
from bshub.copying import named_tensors
from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import find_pairs
from bshub.intake.build import build
from bshub.intake.reference import parse_architecture
from bshub.scoring.plan import make_plan
from bshub.scoring.selection import flag, standardize
from bshub.scoring.statistics import filter_norms, measure
from bshub.scoring.stream import affine_of
from bshub.scoring.suspiciousness import SCORES

CIFAR = "timm/resnet18?num_classes=10&stem=cifar&input_size=32"
NETWORKS = (
    "timm/resnet18",
    "timm/resnet50",
    "timm/densenet121",
    "timm/efficientnet_b0",
    CIFAR,
)
BATCH, IMAGES, TURNS = 16, 32, 3
FEW, MANY, MANY_SMALL = 64, 1024, 4096  # images for the peak memory; at 32 px there is time for more
BOUNDS = {"statistics": 2.0, "spectral": 5.0}  # of --check: generous, since CI shares its cores


def network(reference: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network with random weights in evaluation mode, and its input size."""
    wanted = parse_architecture(reference)
    torch.manual_seed(0)
    model, config, _ = build(wanted, wanted.arguments.get("num_classes", 1000))
    return model, tuple(config["input_size"])  # type: ignore[return-value]


def batches(count: int, size: tuple[int, int, int], batch: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise images, made as they are needed."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, batch):
        n = min(batch, count - start)
        yield torch.randn(n, *size, generator=generator), torch.arange(n) % 10


def bare(model: nn.Module, images: list[tuple[Tensor, Tensor]] | Iterator[tuple[Tensor, Tensor]]) -> None:
    """One forward and backward over all images, and nothing else."""
    for x, y in images:
        F.cross_entropy(model(x), y).backward()
    model.zero_grad(set_to_none=True)


def looker(model: nn.Module, size: tuple[int, int, int]) -> Callable[[Any], Any]:
    """All four statistics, the paper's score, the plan; the network is traced beforehand."""
    flow, _ = follow_channels(model, size)
    pairing = find_pairs(model, flow)

    def look(images: Any) -> Any:
        found = measure(model, pairing, images)
        scores = {name: standardize(SCORES["bss"].function(values)) for name, values in found.items()}
        return make_plan(flow, pairing, flag(pairing.pairs, scores, 2.5))

    return look


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio_to_bare(reference: str, images: int = IMAGES, turns: int = TURNS) -> dict[str, Any]:
    """Median CPU seconds of both and the median of the ratios of one turn."""
    model, size = network(reference)
    look, held = looker(model, size), list(batches(images, size))
    taken = []
    for _ in range(turns + 1):
        taken.append((cpu_seconds(lambda: bare(model, held)), cpu_seconds(lambda: look(held))))
    taken = taken[1:]  # the first turn warms up
    return {
        "model": reference,
        "pixels": size[1],
        "images": images,
        "bare": statistics.median(a for a, _ in taken),
        "ours": statistics.median(b for _, b in taken),
        "ratio": statistics.median(b / a for a, b in taken),
        "turns": turns,
    }


def statistics_rows() -> list[dict[str, Any]]:
    """Time, for every network."""
    return [ratio_to_bare(reference, 256 if reference == CIFAR else IMAGES) for reference in NETWORKS]


def memory_rows() -> list[dict[str, Any]]:
    """Peak memory of both for few images, and of ours for many."""
    rows = []
    for reference in NETWORKS:
        many = MANY_SMALL if reference == CIFAR else MANY
        peaks = [_alone(what, reference, count) for what, count in (("bare", FEW), ("ours", FEW), ("ours", many))]
        rows.append({
            "model": reference, "few": FEW, "many": many, "bare": peaks[0], "ours": peaks[1], "ours_many": peaks[2],
            "ratio": peaks[1] / peaks[0], "growth": peaks[2] / peaks[1], "batch": BATCH,
        })  # fmt: skip
    return rows


def _alone(what: str, reference: str, count: int) -> float:
    """Megabytes that the peak lies above the network at rest, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, what, reference, str(count)], capture_output=True, text=True)
    done.check_returncode()
    return float(done.stdout)


def spectral_rows() -> list[dict[str, Any]]:
    """Channel Lipschitz bounds of all filters of ResNet-50, beside a loop of one SVD per filter."""
    return [spectral_ratio("timm/resnet50")]


def spectral_ratio(reference: str, turns: int = TURNS) -> dict[str, Any]:
    """Both over all conv-BN pairs of a network, and how far their answers lie apart.

    CLP's reference code scales one filter after the other by its batch norm, takes ``torch.svd`` of it, left and right
    vectors included, and of that the largest singular value. Random batch norms stand in for trained ones.
    """
    model, size = network(reference)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
    pairing = find_pairs(model, follow_channels(model, size)[0])
    named = named_tensors(model)
    weights = [named[f"{pair.name}.weight"].detach() for pair in pairing.pairs]
    norms = [pair.readers[0].norm for pair in pairing.pairs]

    def loop() -> list[Tensor]:
        found = []
        for weight, norm in zip(weights, norms, strict=True):
            gain, deviation = named[norm.weight].detach(), (named[norm.variance] + norm.eps).sqrt()
            bounds = []
            for i in range(len(weight)):
                scaled = weight[i].flatten(1) * (gain[i] / deviation[i]).abs()
                bounds.append(torch.svd(scaled)[1].max())
            found.append(torch.tensor(bounds))
        return found

    def ours() -> list[Tensor]:
        scales = [affine_of(pair, named).scale.abs() for pair in pairing.pairs]
        return [filter_norms(weight) * scale for weight, scale in zip(weights, scales, strict=True)]

    error = max(float((a / b - 1).abs().max()) for a, b in zip(ours(), loop(), strict=True))
    taken = [(cpu_seconds(ours), cpu_seconds(loop)) for _ in range(turns)]
    return {
        "model": reference,
        "filters": sum(len(weight) for weight in weights),
        "ours": statistics.median(a for a, _ in taken),
        "loop": statistics.median(b for _, b in taken),
        "ratio": statistics.median(b / a for a, b in taken),
        "error": error,
        "turns": turns,
    }


def check() -> int:
    """Ratios on small networks against bounds that only a real regression crosses; the exit code."""
    narrow = "timm/resnet18?num_classes=10&stem=cifar&channels=16,32,64,128&input_size=32"
    looked, spectral = ratio_to_bare(narrow, 64), spectral_ratio("timm/resnet50", 1)
    print(f"statistics + scores + plan ÷ forward + backward: {looked['ratio']:.2f} (at most {BOUNDS['statistics']})")
    print(f"SVD loop ÷ spectral norms: {spectral['ratio']:.0f} (at least {BOUNDS['spectral']:.0f})")
    return int(looked["ratio"] > BOUNDS["statistics"] or spectral["ratio"] < BOUNDS["spectral"])


def _peak(what: str, reference: str, count: int) -> float:
    torch.set_num_threads(1)
    model, size = network(reference)
    work = looker(model, size) if what == "ours" else (lambda images: bare(model, images))
    work(batches(2, size))  # libraries load their kernels
    gc.collect()
    with costs() as cost:
        work(batches(count, size))
    assert cost.megabytes is not None, "the peak of a process's memory is only told by Linux"
    return cost.megabytes


if __name__ == "__main__":
    print(_peak(sys.argv[1], sys.argv[2], int(sys.argv[3])))
