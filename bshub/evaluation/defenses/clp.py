"""Channel Lipschitzness based pruning: no data, no training.

``prune channel o of a layer  ⇔  s_o > mean(s) + u · std(s)``, with the bound of the channel's Lipschitz constant
``s_o = σ_max(W[o] as (in/groups, kh·kw)) · |γ_o| / √(σ²_o + ε)``.

Source: arXiv 2208.03111, section 4 (equations 9 and 10). Hyper-parameter of the official code: u = 3; the
standard deviation is the unbiased one. A pruned channel's batch norm gets γ = β = 0, as there.

Deviations: pairs of convolution and batch norm come from the recorded data flow (the official code pairs a batch
norm with the convolution that was registered before it, wrong in pre-activation networks), so a layer is a
convolution; ε stands in the bound (the official code leaves it out). A filter that several batch norms read
(DenseNet) is judged by the strongest and silenced in all.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from bshub.clean import CleanImages
from bshub.evaluation.defenses.interface import DefenseSettings
from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import find_pairs
from bshub.scoring.statistics import measure


def clp(model: nn.Module, clean: CleanImages, settings: DefenseSettings, *, u: float = 3.0) -> nn.Module:
    """Silence the channels with an outstanding Lipschitz bound.

    Args:
        model: The network; not changed.
        clean: Only the size of its images is used.
        settings: Only ``progress`` is used; nothing is random.
        u: Threshold in standard deviations.

    Returns:
        The pruned copy, same shapes.

    Raises:
        InconclusiveError: A weight is NaN or infinite.
        TraceError: The model does not run.
    """
    pruned = copy.deepcopy(model).eval()
    pairing = find_pairs(pruned, follow_channels(pruned, clean.input_size)[0])
    statistics = measure(pruned, pairing, None)
    for pair in pairing.pairs:
        paired = torch.from_numpy(pair.paired)
        found = outstanding(statistics[pair.name].spectral, paired, u).numpy()
        for reader in pair.readers:
            rows = torch.from_numpy(reader.channels[np.isin(reader.filters, found)])
            for name in (reader.norm.weight, reader.norm.bias):
                if name is not None and len(rows):
                    parameter = pruned.get_parameter(name)
                    with torch.no_grad():
                        parameter[rows.to(parameter.device)] = 0
        settings.progress(1)
    return pruned


def outstanding(bounds: Tensor, paired: Tensor, u: float) -> Tensor:
    """Indices of the bounds above ``mean + u · std``.

    Args:
        bounds: Channel Lipschitz bounds, ``[out]``.
        paired: Which filters have a batch norm, ``[out]`` bool; only these count.
        u: Threshold in (unbiased) standard deviations.

    Returns:
        ``[flagged]``.
    """
    known = bounds[paired]
    if len(known) < 2:
        return torch.empty(0, dtype=torch.long)
    return torch.nonzero(paired & (bounds > known.mean() + u * known.std())).flatten()
