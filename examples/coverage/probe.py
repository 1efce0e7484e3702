"""Prune one model at random and judge the result by seven marks.

The marks: ``forward`` runs with equal shapes · ``exact``: logits equal the original's with the same channels
zeroed at every consumer · ``reach``: at least 90 % of the conv-BN filters lie in removable groups · ``smaller``:
fewer parameters · ``trains``: one training step · ``rebuilt``: the recipe gives the same logits, bit for bit, in a
fresh process · ``onnx``: export, checker, parity.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bshub.graph.coupling import ChannelFlow, follow_channels
from bshub.graph.pairs import Pairing, find_pairs
from bshub.intake.loading import load_into
from bshub.intake.recipe import Recipe, apply_recipe
from bshub.intake.reference import parse_architecture
from bshub.release.onnx import export_onnx
from bshub.surgery.remove import Removal, remove

FRACTION = 0.15
EXACT = 1e-5


def construct(reference: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model of timm or torchvision with random weights, and its input size."""
    wanted = parse_architecture(reference)
    torch.manual_seed(0)
    if wanted.library == "timm":
        import timm

        model = timm.create_model(wanted.name)
        size = tuple(model.pretrained_cfg.get("test_input_size") or model.pretrained_cfg["input_size"])
        if not model.pretrained_cfg.get("fixed_input_size"):
            size = tuple(model.pretrained_cfg["input_size"])
    else:
        import torchvision

        extra = {"init_weights": False} if wanted.name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(wanted.name, weights=None, **extra)
        size = (3, 299, 299) if wanted.name == "inception_v3" else (3, 224, 224)
    return model, size


def build(reference: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The model with random, non-degenerate batch-norm numbers, in evaluation mode."""
    model, size = construct(reference)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor):
            mean.copy_(torch.randn(mean.shape, generator=generator) * 0.1)
            var.copy_(torch.rand(var.shape, generator=generator) + 0.5)
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor):
                weight.data.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
                bias.data.copy_(torch.randn(bias.shape, generator=generator) * 0.1)
    return calibrate(model.eval(), size), size


def calibrate(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """Running statistics near those of noise images: deep random nets would overflow or vanish otherwise."""
    images = torch.randn(4, *size, generator=torch.Generator().manual_seed(1))
    norms = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), torch.Tensor)]

    def adopt(module: Any, args: Any) -> None:
        x = args[0].detach()
        dims = [d for d in range(x.ndim) if d != 1]
        module.running_mean.copy_(x.mean(dims) + 0.1 * torch.randn(x.shape[1]))
        module.running_var.copy_(x.var(dims, correction=0) * (0.5 + torch.rand(x.shape[1])) + 1e-3)

    handles = [norm.register_forward_pre_hook(adopt) for norm in norms]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return model


def choose(flow: ChannelFlow, pairing: Pairing) -> dict[str, np.ndarray]:
    """Whole coupling groups at random, so that a share of every layer can leave physically."""
    generator = np.random.default_rng(0)
    writers: dict[int, list[tuple[str, int]]] = {}
    for pair in (*pairing.pairs, *pairing.bare):
        for index, group in enumerate(flow.groups[pair.slots].tolist()):
            writers.setdefault(group, []).append((pair.name, index))
    flagged: dict[str, list[int]] = {}
    for members in writers.values():
        if generator.random() < FRACTION:
            for name, index in members:
                flagged.setdefault(name, []).append(index)
    return {name: np.array(sorted(index)) for name, index in flagged.items()}


def reach(flow: ChannelFlow, pairing: Pairing) -> float:
    """Share of paired filters whose group may leave."""
    total = free = 0
    for pair in pairing.pairs:
        groups = flow.groups[pair.slots][pair.paired].tolist()
        total += len(groups)
        free += sum(group not in flow.pinned for group in groups)
    return free / max(total, 1)


def train_step(model: nn.Module, size: tuple[int, int, int]) -> bool:
    """One forward and backward in training mode, auxiliary heads included."""
    trained = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
    answers = trained(torch.randn(2, *size))
    parts = answers if isinstance(answers, (tuple, list)) else [answers]
    loss = sum(part.float().square().mean() for part in parts if isinstance(part, torch.Tensor))
    loss.backward()
    optimizer.step()
    return bool(torch.isfinite(loss))


def store(removal: Removal, images: torch.Tensor, folder: Path) -> None:
    """What a fresh process needs: tensors, recipe, images and the answers to them."""
    state = {name: tensor.contiguous().clone() for name, tensor in removal.model.state_dict().items()}
    save_file(state, folder / "state.safetensors")
    with torch.no_grad():
        save_file({"images": images, "logits": removal.model(images).contiguous()}, folder / "io.safetensors")
    recipe = Recipe(removal.attributes, removal.plan.kept, refilled=removal.plan.refilled).as_json()
    (folder / "recipe.json").write_text(json.dumps(recipe))


def rebuilds(reference: str, folder: Path) -> bool:
    """The fresh process' side: build, apply, load, compare."""
    model, _ = construct(reference)
    state = load_file(folder / "state.safetensors")
    apply_recipe(model, Recipe.from_json(json.loads((folder / "recipe.json").read_text())), state)
    load_into(model, state, origin=reference)
    given = load_file(folder / "io.safetensors")
    with torch.no_grad():
        return torch.equal(model.eval()(given["images"]), given["logits"])


def original_onnx(reference: str) -> bool:
    """Whether the untouched network can be exported; raises what export raises."""
    model, size = build(reference)
    with tempfile.TemporaryDirectory() as folder:
        return export_onnx(model, torch.randn(4, *size), Path(folder) / "model.onnx").holds


def probe(reference: str, with_onnx: bool, folder: Path) -> dict[str, Any]:
    """All marks of one model."""
    row: dict[str, Any] = {"model": reference}
    model, size = build(reference)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(2))
    start = time.perf_counter()
    flow, _ = follow_channels(model, size)
    pairing = find_pairs(model, flow)
    row["trace"] = round(time.perf_counter() - start, 3)
    removal = remove(model, flow, pairing, choose(flow, pairing), images)
    row["surgery"] = round(time.perf_counter() - start - row["trace"], 3)
    pinned = {
        reason
        for pair in pairing.pairs
        for group in flow.groups[pair.slots].tolist()
        if (reason := flow.pinned.get(group))
    }
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, removal.model))
    with torch.no_grad():
        row["forward"] = removal.model(images).shape == model(images).shape
    row["error"] = removal.proof.error
    row["exact"] = removal.proof.holds and removal.proof.error <= EXACT
    row["share"] = round(reach(flow, pairing), 4)
    row["reach"] = row["share"] >= 0.9 and not removal.refused
    row["parameters"] = [before, after]
    row["smaller"] = after < before
    row["counts"] = removal.plan.counts()
    row["pairs"], row["unpaired"] = len(pairing.pairs), len(pairing.unpaired)
    row["reasons"] = sorted(pinned)
    row["refused"] = removal.refused
    row["trains"] = attempt(row, "trains", lambda: train_step(removal.model, size))
    store(removal, images, folder)
    if with_onnx:
        row["onnx"] = attempt(row, "onnx", lambda: export_onnx(removal.model, images, folder / "model.onnx").holds)
    return row


def attempt(row: dict[str, Any], mark: str, judge: Any) -> bool:
    """A mark, False with the reason noted where its check raises."""
    try:
        return bool(judge())
    except Exception as error:
        row[f"{mark}_error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        return False
