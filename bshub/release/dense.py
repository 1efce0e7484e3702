"""The dense copy: a sanitized network at its original shapes, for loaders that know nothing of a recipe.

With ``K_a`` the kept indices of axis ``a``, ``dense[ix(K_0, K_1, …)] = small`` and zero everywhere else; a
``running_var`` is 1 there. A channel that left is then zero behind its batch norm, and every consumer reads it with
zero weights. The copy computes the same function, which is proved on images; it is as large as the original, and its
zeros are ordinary parameters, so further training can bring what was removed back to life.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bshub.errors import BshubError, ExportError, UsageError
from bshub.files import sha256
from bshub.intake.build import build
from bshub.intake.loading import load_into
from bshub.intake.models import LoadedModel
from bshub.intake.recipe import Recipe
from bshub.release.artifact import WEIGHTS, dense_config, write_json, write_report, write_weights
from bshub.release.card import dense_card
from bshub.surgery.proof import Proof, compare

FOLDER = "dense"
LEAVE_OUT = "leave out --dense; bshub.load and the card's loader rebuild the small model"


def check_dense(source: LoadedModel) -> None:
    """Refuse early what cannot have a dense copy.

    Raises:
        UsageError: The network is not one that its library builds by name and arguments.
    """
    if source.origin.recipe.stem or source.origin.architecture.stem:
        raise UsageError(
            "a network with stem=cifar has no dense copy: timm's config cannot state that stem", hint=LEAVE_OUT
        )


def dense_copy(source: LoadedModel, small: nn.Module, recipe: Recipe, images: Tensor) -> tuple[nn.Module, Proof]:
    """Build the dense copy and prove it.

    Args:
        source: What the small network was made from; says how the library builds it.
        small: The sanitized network, on the CPU.
        recipe: Everything that surgery changed, in original indices.
        images: Real, normalised images ``[n, c, h, w]`` for the proof.

    Returns:
        The copy in evaluation mode, and the comparison of its logits with the small network's.

    Raises:
        UsageError: The architecture has no dense copy.
        ExportError: The copy does not compute what the small network computes.
    """
    check_dense(source)
    try:
        dense = full_network(source, small, recipe)
    except BshubError as error:
        raise ExportError(f"no dense copy: {error.message}", hint=LEAVE_OUT) from None
    proof = compare(small, dense, images)
    if not proof.holds:
        raise ExportError(
            f"no dense copy: its logits differ from the small model's by {proof.error:.2g} (at most {proof.bound:g})",
            hint=LEAVE_OUT,
        )
    return dense, proof


def full_network(source: LoadedModel, small: nn.Module, recipe: Recipe) -> nn.Module:
    """The network as its library builds it, with the small one's tensors in their first places.

    Args:
        source: Says how the library builds it.
        small: The sanitized network, on the CPU.
        recipe: Everything that surgery changed, in original indices.

    Returns:
        In evaluation mode.

    Raises:
        BshubError: The library does not build it, or the recipe does not fit.
    """
    full, _, _ = build(source.origin.architecture, source.origin.num_classes, stem=recipe.stem)
    load_into(full, scatter(small.state_dict(), recipe, full.state_dict()), origin="the dense copy")
    return full


def scatter(small: Mapping[str, Tensor], recipe: Recipe, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the small tensors back into their original places.

    Args:
        small: State of the sanitized network.
        recipe: Its kept indices.
        full: State of the network as its library builds it, for the shapes.

    Returns:
        Tensors of the shapes in ``full``.

    Raises:
        ExportError: The recipe does not fit.
    """
    dense = {}
    for name, tensor in small.items():
        axes = recipe.kept.get(name, {})
        if name not in full or full[name].ndim != tensor.ndim:
            raise ExportError(f"the library's network has no such tensor as {name!r}", hint=LEAVE_OUT)
        places = [torch.tensor(axes.get(axis, range(size))) for axis, size in enumerate(full[name].shape)]
        fits = [len(index) for index in places] == list(tensor.shape)
        if not fits or any(len(p) and int(p.max()) >= n for p, n in zip(places, full[name].shape, strict=True)):
            raise ExportError(f"the recipe does not fit the tensor {name!r}", hint=LEAVE_OUT)
        if not axes:
            dense[name] = tensor
            continue
        filler = 1.0 if name.endswith("running_var") else 0.0
        whole = torch.full(tuple(full[name].shape), filler, dtype=tensor.dtype)
        whole[torch.meshgrid(*places, indexing="ij")] = tensor.cpu()
        dense[name] = whole
    return dense


def write_dense(folder: Path, source: LoadedModel, dense: nn.Module, proof: Proof, small: Path) -> None:
    """Write the copy into ``folder``: weights, timm's config, a card that says what it is, and a report of its own.

    Args:
        folder: To be made.
        source: What it was made from.
        dense: The copy.
        proof: Of its equality.
        small: The small model's weights.
    """
    folder.mkdir()
    write_weights(folder / WEIGHTS, dense)
    write_json(folder / "config.json", dense_config(dense, source))
    (folder / "README.md").write_text(dense_card(source, proof), encoding="utf-8")
    write_report(folder, {"kind": "dense copy", "copy_of": {WEIGHTS: sha256(small)}, "proof": proof.as_dict()})
