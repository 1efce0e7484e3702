"""The small model at widths that runtimes compute fast: whole blocks of filters, filled up with zeros.

The kernels of onnxruntime compute a convolution in blocks of 8 or 16 filters and fall back to slower ones where the
width is no multiple: a MobileNet that has lost 51 filters takes twice the time of the whole one. So a layer that was
made of whole blocks goes into the ONNX file in whole blocks, and filters of zeros take the places of some that left.
They are cut out of the dense copy (``dense.py``) like the rest of them, only fewer, and the result is held against the
small model on images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from bshub.errors import BshubError
from bshub.graph.coupling import ChannelFlow, follow_channels
from bshub.graph.pairs import Pairing, find_pairs
from bshub.intake.models import LoadedModel
from bshub.intake.recipe import Recipe
from bshub.release.dense import full_network
from bshub.scoring.plan import cuts_alone, variables_gone
from bshub.surgery.proof import compare
from bshub.surgery.remove import narrowed_copy

BLOCKS = 16, 8  # filters; the larger of them that the original width was a multiple of


@dataclass(frozen=True)
class Evened:
    """A model to be written for a runtime.

    Attributes:
        model: In evaluation mode, on the CPU.
        zeros: Filters of zeros in it.
        why: Where whole blocks were wanted and could not be had: why not.
    """

    model: nn.Module
    zeros: int = 0
    why: str | None = None

    def facts(self) -> dict[str, int | str]:
        """For reports."""
        return {"zero_filters": self.zeros} | ({} if self.why is None else {"uneven": self.why})


def evened(source: LoadedModel, small: nn.Module, recipe: Recipe, images: Tensor) -> Evened:
    """Bring the small model's layers up to whole blocks.

    Args:
        source: Says how the library builds the network.
        small: The narrowed network, on the CPU; not changed.
        recipe: Everything that surgery changed, in original indices.
        images: Normalised images ``[n, c, h, w]`` for the comparison.

    Returns:
        A copy that computes the same, or the small model itself where no layer is uneven or the copy does not hold.
    """
    if not recipe.kept:
        return Evened(small)
    try:
        full = full_network(source, small, recipe)
        size = images.shape[1], images.shape[2], images.shape[3]
        flow, _ = follow_channels(full, size)
        pairing = find_pairs(full, flow)
        gone = variables_gone(flow, recipe.kept)
        left = _whole_blocks(flow, pairing, gone)
        zeros = _filters(pairing, gone & ~left)
        if not zeros:
            return Evened(small)
        wide, _ = narrowed_copy(full, cuts_alone(flow, left), flow, size)
        proof = compare(wide, small, images)
    except (BshubError, RuntimeError, ValueError, LookupError, TypeError, AssertionError) as error:
        return Evened(small, why=str(error).splitlines()[0] if str(error) else type(error).__name__)
    if not proof.holds:
        return Evened(small, why=f"its logits would differ by {proof.error:.2g} (at most {proof.bound:g})")
    return Evened(wide, zeros)


def _whole_blocks(flow: ChannelFlow, pairing: Pairing, gone: np.ndarray) -> np.ndarray:
    """What leaves if every layer that was made of whole blocks is to be so again; the same or less."""
    left = gone.copy()
    while True:
        before = int(left.sum())
        for pair in (*pairing.pairs, *pairing.bare):
            block = next((block for block in BLOCKS if pair.out_channels % block == 0), 1)
            for slot in pair.slots[left[pair.slots]]:
                if int((~left[pair.slots]).sum()) % block == 0:
                    break
                left[flow.groups == flow.groups[slot]] = False
        if int(left.sum()) == before:  # a group that came back may have made another layer uneven
            return left


def _filters(pairing: Pairing, gone: np.ndarray) -> int:
    return sum(int(gone[pair.slots].sum()) for pair in (*pairing.pairs, *pairing.bare))
