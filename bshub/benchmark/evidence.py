"""Which statistic finds the backdoor? Each one held against the trigger-activated change of the real trigger.

This looks at the trigger on test images: it explains methods, it is no part of one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.benchmark.draws import batches, draw
from bshub.benchmark.grid import Victim, load_tests, unseen
from bshub.evaluation.defenses.training import logits_of
from bshub.graph.coupling import follow_channels
from bshub.graph.pairs import ConvBN, Pairing, find_pairs
from bshub.graph.trace import in_mode
from bshub.intake.folders import ClassFolder
from bshub.scoring.response import activated_change, strongest, trigger_response
from bshub.scoring.shortcut import find_shortcut
from bshub.scoring.statistics import PairStatistics, measure
from bshub.scoring.suspiciousness import SCORES

TOP = 0.05  # of a layer's filters: those that TAC puts first are the ones to find
ASCENT_LR, ASCENT_STEPS, FLOOR = 1e-3, 100, 0.1


@dataclass(frozen=True)
class LayerEvidence:
    """One layer of one model.

    Attributes:
        layer: The convolution.
        filters: How many.
        spearman: Score → rank correlation with TAC.
        hits: Score → share of the filters with the highest TAC among as many with the highest score.
    """

    layer: str
    filters: int
    spearman: dict[str, float]
    hits: dict[str, float]


def judge_statistics(
    victim: Victim, train: ClassFolder, test: ClassFolder, chosen: list[int], per_class: int, seed: int
) -> list[LayerEvidence]:
    """Every score and the unlearning change of every layer beside TAC.

    Args:
        victim: A backdoored model.
        train: Where the clean images are drawn.
        test: Where the change is measured.
        chosen: Indices of the test images.
        per_class: Clean images per class.
        seed: Of the draw.
    """
    assert victim.trigger is not None
    model = victim.source.module.eval()
    flow, _ = follow_channels(model, victim.source.preprocessing.input_size)
    pairing = find_pairs(model, flow)
    avoid = set(victim.record.get("poisoned", {}).get("files", []))
    clean = batches(draw(train, per_class, seed, avoid, unseen(test, chosen)), victim.source.preprocessing, 32)
    images, _, stamped = load_tests(test, chosen, victim)
    assert stamped is not None
    change = activated_change(model, pairing, images, stamped)
    statistics = _with_response(model, pairing, clean, measure(model, pairing, clean), seed)
    unlearned = unlearning_change(model, pairing, clean, seed)
    return [_layer(pair, statistics[pair.name], unlearned[pair.name], change[pair.name]) for pair in pairing.pairs]


def _with_response(
    model: nn.Module,
    pairing: Pairing,
    clean: list[tuple[Tensor, Tensor]],
    statistics: dict[str, PairStatistics],
    seed: int,
) -> dict[str, PairStatistics]:
    """The statistics with the answer to the inverted triggers, found on the same images; zero where none is found."""
    images, labels = (torch.cat(parts) for parts in zip(*clean, strict=True))
    triggers = find_shortcut(model, images, labels, seed).triggers
    response = strongest([trigger_response(model, pairing, images, labels, trigger) for trigger in triggers])
    return {name: replace(s, tac=response.get(name, torch.zeros_like(s.spectral))) for name, s in statistics.items()}


def _layer(pair: ConvBN, statistics: PairStatistics, unlearned: Tensor, change: Tensor) -> LayerEvidence:
    values = {name: score.function(statistics) for name, score in SCORES.items()}
    for name in ("activation", "correlation", "saliency"):
        values[f"low {name}"] = -getattr(statistics, name)
    values["unlearning"] = unlearned
    return LayerEvidence(
        pair.name,
        pair.out_channels,
        {name: spearman(value, change) for name, value in values.items()},
        {name: hit_rate(value, change) for name, value in values.items()},
    )


def unlearning_change(
    model: nn.Module, pairing: Pairing, clean: list[tuple[Tensor, Tensor]], seed: int
) -> dict[str, Tensor]:
    """``Σ |ΔW|`` of each filter after gradient ascent on the clean loss (the neuron weight change of TSBD).

    The ascent ends when the accuracy on the clean images falls to a tenth, or after a hundred passes.
    """
    student = copy.deepcopy(model)
    optimizer = torch.optim.SGD(student.parameters(), lr=ASCENT_LR, momentum=0.9)
    torch.manual_seed(seed)
    with in_mode(student, True):
        for _ in range(ASCENT_STEPS):
            right = count = 0
            for images, labels in clean:
                logits = logits_of(student, images)
                optimizer.zero_grad(set_to_none=True)
                (-F.cross_entropy(logits, labels)).backward()
                nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                right += int((logits.argmax(1) == labels).sum())
                count += len(labels)
            if right <= FLOOR * count:
                break
    result = {}
    for pair in pairing.pairs:
        before, after = (m.get_parameter(f"{pair.name}.weight").detach() for m in (model, student))
        result[pair.name] = (after - before).abs().flatten(1).sum(1)
    return result


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; ties get their mean rank; 0 where one side is constant."""
    ra, rb = _ranks(a), _ranks(b)
    ra, rb = ra - ra.mean(), rb - rb.mean()
    scale = (ra.square().sum() * rb.square().sum()).sqrt()
    return float((ra * rb).sum() / scale) if scale > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    values = values.double()
    less = (values.unsqueeze(1) > values.unsqueeze(0)).sum(1)
    equal = (values.unsqueeze(1) == values.unsqueeze(0)).sum(1)
    return less + (equal - 1) / 2


def hit_rate(score: Tensor, change: Tensor) -> float:
    """Share of the filters with the highest change among as many with the highest score."""
    count = max(1, round(TOP * len(change)))
    wanted = set(change.topk(count).indices.tolist())
    return len(wanted & set(score.topk(count).indices.tolist())) / count
