"""Torch-Pruning on one model, judged by the same marks: the same fraction of channels, random weights, same images.

Its own choice of channels (random importance) is read back from the pruned weights: before pruning, every weight is
made unique in float64, so that each entry that is left tells where it came from. The oracle is the original with
the lost input columns zero in every row that stayed.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch
from probe import FRACTION, attempt, build, train_step
from torch import nn

from bshub.release.onnx import export_onnx

EXACT = 1e-6  # in float64


def peer(reference: str, with_onnx: bool, folder: Any) -> dict[str, Any]:
    """The marks of Torch-Pruning on one model."""
    import torch_pruning as tp

    row: dict[str, Any] = {"model": reference}
    model, size = build(reference)
    model = unique_weights(model)
    pruned = copy.deepcopy(model)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    classes = model(images[:1]).shape[-1]
    heads = [m for m in pruned.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and classes in _outputs(m)]
    torch.manual_seed(0)
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        pruned, images[:1], importance=tp.importance.RandomImportance(), pruning_ratio=FRACTION, ignored_layers=heads
    )
    pruner.step()
    row["seconds"] = round(time.perf_counter() - start, 3)
    row["pruned"] = True
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, pruned))
    row["parameters"] = [before, after]
    with torch.no_grad():
        wanted = model(images)
        found = attempt_value(row, "forward", lambda: pruned.eval()(images))
        row["forward"] = found is not None and found.shape == wanted.shape
        row["exact"] = row["forward"] and attempt(row, "exact", lambda: _error(row, model, pruned, images) <= EXACT)
    row["smaller"] = row["forward"] and after < before
    pruned = pruned.float()
    row["trains"] = attempt(row, "trains", lambda: train_step(pruned, size))
    if with_onnx:
        row["onnx"] = row["forward"] and attempt(
            row, "onnx", lambda: export_onnx(pruned, images.float(), folder / "peer.onnx").holds
        )
    return row


def attempt_value(row: dict[str, Any], mark: str, make: Any) -> Any:
    """A value, None with the reason noted where making it raises."""
    try:
        return make()
    except Exception as error:
        row[f"{mark}_error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        return None


def unique_weights(model: nn.Module) -> nn.Module:
    """In float64, each entry of each weight moved by some 1e-9 of its own."""
    model = model.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-9 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def _outputs(module: nn.Module) -> tuple[int, ...]:
    return (module.out_features,) if isinstance(module, nn.Linear) else (module.out_channels,)


def _error(row: dict[str, Any], model: nn.Module, pruned: nn.Module, images: torch.Tensor) -> float:
    masked = copy.deepcopy(model)
    small = dict(pruned.named_modules())
    for name, module in masked.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            _zero_lost_columns(module.weight.data, small[name].weight.data)
    wanted, found = masked(images), pruned(images)
    row["error"] = float((wanted - found).abs().max() / wanted.abs().max())
    return row["error"]


def _zero_lost_columns(full: torch.Tensor, small: torch.Tensor) -> None:
    """Zero, in the rows that stayed, the columns that did not."""
    first, kept = (t.flatten(2)[:, :, 0] if t.ndim > 2 else t for t in (full, small))
    values = first.flatten().numpy()
    order = np.argsort(values)
    place = order[np.searchsorted(values, kept.flatten().numpy(), sorter=order).clip(max=len(values) - 1)]
    if not np.array_equal(values[place], kept.flatten().numpy()):
        raise ValueError("a weight was changed, not only moved")
    rows = torch.from_numpy(np.unique(place // first.shape[1]))
    stays = torch.zeros(first.shape, dtype=torch.bool).flatten()
    stays[torch.from_numpy(place)] = True
    stays = stays.view(first.shape)
    for row in rows.tolist():
        full[row, ~stays[row]] = 0
