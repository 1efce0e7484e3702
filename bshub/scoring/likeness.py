"""Does an inverted trigger show the network what real images of its class show it?

A class may be easy to reach without a backdoor: a short stroke makes a 4 of most digits. Such a change excites the
filters by which the network knows the class; a backdoor has filters of its own. In the middle of the network the two
can be told apart (at its end both must look like the class, at its beginning neither does): there the change that the
trigger makes to the filters' means correlates with the difference between real images of the class and all others, or
does not. The idea is that of EX-RAY (Liu et al., *Complex Backdoor Detection by Symmetric Feature Differencing*, CVPR
2022), with a correlation in place of its masks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bshub.graph.pairs import Pairing
from bshub.scoring.inversion import InvertedTrigger
from bshub.scoring.response import mean_maps

MOST = 128  # images of the class, and of the others
FEWEST = 5  # images of the class; one or two show themselves more than their class
LIKE = 0.27  # from which a trigger is like its class: backdoors came to 0.24 at most, natural ways (but one) to 0.28
NATURAL = 4.0  # a gap beyond which likeness is no excuse: natural ways came to 2.7
TINY = 1e-6


def likeness(
    model: nn.Module, pairing: Pairing, images: Tensor, labels: Tensor, trigger: InvertedTrigger
) -> float | None:
    """Correlation of what a trigger changes with what makes out its class, in the middle half of the network.

    Per layer, over the filters ``k``, ``corr(d_k / s_k, e_k / s_k)`` with ``d = E[a(x + trigger)] - E[a(x)]`` over the
    images ``x`` of other classes, ``e = E[a(x')] - E[a(x)]`` with ``x'`` of the trigger's class, ``a`` the mean of a
    filter's map, and ``s`` its deviation over ``x``.

    Args:
        model: In evaluation mode.
        pairing: Its pairs.
        images: Clean, ``[n, c, h, w]``.
        labels: ``[n]``.
        trigger: With its strength.

    Returns:
        The mean over the layers, -1 to 1; None where there are fewer than ``FEWEST`` images of the class, or of others.
    """
    own, others = images[labels == trigger.target], images[labels != trigger.target]
    if min(len(own), len(others)) < FEWEST:
        return None
    own, others = own[:MOST], others[:MOST]
    plain, real, led = (mean_maps(model, pairing, part) for part in (others, own, trigger(others)))
    names = [pair.name for pair in pairing.pairs]
    middle = names[len(names) // 4 : 3 * len(names) // 4] or names
    found = []
    for name in middle:
        start = plain[name].mean(0)
        spread = plain[name].std(0) + 0.1 * plain[name].std(0).mean() + TINY
        found.append(_correlation((led[name].mean(0) - start) / spread, (real[name].mean(0) - start) / spread))
    return sum(found) / len(found)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, 0 where one does not vary."""
    if len(a) < 2:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)).clamp_min(TINY))
