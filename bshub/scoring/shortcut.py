"""Is there a class that a small universal change leads to, as no other? Then that change stands in for a trigger.

All classes race: each gets an inverted trigger whose strength falls while it works and grows while it does not. The
ones that need least run on, as long as one of them comes lower. The race is run on half the images: it only orders the
classes. A need is a mean over the last steps, since a strength swings around it: so the needs of innocent classes came
to within a factor of 1.2. A class is found where the next one needs at least ``GAP`` times as much, ``GAP_MADE_UP``
times on made-up images, where one class that several families agree on is found as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bshub.graph.trace import in_mode
from bshub.scoring.families import FAMILIES, dense_fit, dense_step
from bshub.scoring.feed import BATCH, Feed
from bshub.scoring.inversion import STEP, InvertedTrigger
from bshub.scoring.statistics import asking_only
from bshub.side_by_side import side_by_side

RACE_BATCH = 8  # images per step of the race; later ones take more
RACE, FINAL, SETTLE = 12, 32, 8  # steps: of every class, of the finalists at most, of what was found
PATIENCE = 8  # steps without a lower strength of any finalist that end the final
LAP = 8  # steps of the race after which only its first half runs on
HOPEFUL = 0.3  # mean probability of its class that a change comes to by then, or none of the family will get through
FINALISTS = 4
CLEAR, SURE = 4.0, 3  # a gap that ends a race after so many steps in turn: nobody asks for a wider one
GAP = 1.35
GAP_MADE_UP = 2.25  # on made-up images: they lie nearer to some classes than to others, and innocent networks reach 2
AGREED = 3.0  # on made-up images: product of the gaps of one class in several families, each at least GAP
EXCESS = 3.0  # a found trigger is used at this multiple of its need, but never where the next class would be reached
MIN_CLASSES = 4  # with fewer there is nothing to stand out from
SCREENED = 10  # classes that race; of more, those that an untargeted change leads to
SCREEN = 12

Race = list[tuple[InvertedTrigger, float]]  # finalists with their needs, the least first


@dataclass(frozen=True)
class Shortcut:
    """What the search came to.

    Attributes:
        triggers: One for each family and class that stands out; empty: none does.
        needs: Family → class → strength that was needed, of the classes that were in the final.
        gaps: Family → next class's need over the first's.
        searched: Whether there were enough classes to compare.
        least: The gap from which a class was to be found.
        doubted: Triggers that were found and are not believed, see ``confirmation.py``.
        natural: Triggers that were found and are, or may be, the natural way to their class, see ``confirmation.py``.
        apart: Whether a believed one passes by the filters that batch norm remembers: something else was planted too.
        shares: Class → share of the training images that carried it, if it was no stronger, see ``recall.py``.
    """

    triggers: tuple[InvertedTrigger, ...]
    needs: dict[str, dict[int, float]]
    gaps: dict[str, float]
    searched: bool = True
    least: float = GAP
    doubted: tuple[InvertedTrigger, ...] = ()
    natural: tuple[InvertedTrigger, ...] = ()
    apart: bool = False
    shares: dict[int, float] = field(default_factory=dict)

    @property
    def targets(self) -> list[int]:
        """The classes found, without repetition."""
        return list(dict.fromkeys(trigger.target for trigger in self.triggers))

    def reason(self) -> str:
        """In words."""
        if not self.searched:
            return f"with fewer than {MIN_CLASSES} classes none can stand out"
        if self.doubted and not self.triggers:
            return (
                f"what was found does not pass through the filters that batch norm remembers: {self._of(self.doubted)}"
            )
        if self.natural and not self.triggers:
            return (
                "what was found looks to the network like real images of its class, or cannot be unlearned without "
                f"loss: {self._of(self.natural)}"
            )
        if not self.triggers:
            return f"no class is reached more easily than the others (gaps {self._gaps()}; {self.least} would be found)"
        return f"a small change of any image leads to one class: {self._of(self.triggers)}"

    def _of(self, triggers: tuple[InvertedTrigger, ...]) -> str:
        return ", ".join(f"{t.family} toward class {t.target} ({self._why(t)})" for t in triggers)

    def _why(self, trigger: InvertedTrigger) -> str:
        if trigger.family in self.gaps:
            return f"gap {self.gaps[trigger.family]:.2f}"
        return f"batch norm remembers it, as if {100 * self.shares[trigger.target]:.0f} % of the training images had it"

    def _gaps(self) -> str:
        return ", ".join(f"{name} {gap:.2f}" for name, gap in self.gaps.items())

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return {
            "found": [{"family": t.family, "target": t.target, "strength": t.strength} for t in self.triggers],
            "doubted": [{"family": t.family, "target": t.target} for t in self.doubted],
            "natural": [{"family": t.family, "target": t.target} for t in self.natural],
            "needs": {name: {str(c): round(v, 5) for c, v in need.items()} for name, need in self.needs.items()},
            "gaps": {name: round(gap, 3) for name, gap in self.gaps.items()},
            "shares": {str(target): round(share, 4) for target, share in self.shares.items()},
            "reason": self.reason(),
        }


def total_steps(classes: int) -> int:
    """Upper bound of the steps that :func:`find_shortcut` reports for a network of that many classes."""
    race = classes * RACE if classes <= 2 * SCREENED else SCREEN + SCREENED * RACE
    return len(FAMILIES) * (race + FINALISTS * FINAL + FINALISTS // 2 * SETTLE)


def find_shortcut(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    seed: int,
    progress: Callable[[int], None] | None = None,
    least: float = GAP,
    half: bool = False,
) -> Shortcut:
    """Search every family of changes for classes that stand out.

    Args:
        model: In evaluation mode; not changed.
        images: Clean images, normalised, ``[n, c, h, w]``.
        labels: ``[n]``.
        seed: Of the order and the augmentation.
        progress: Called with the number of steps done.
        least: The gap from which a class is found.
        half: Whether to compute in bfloat16.

    Returns:
        What was found, settled at the strength it will be used with.
    """
    with torch.no_grad():
        classes = model(images[:1]).shape[-1]
    if classes < MIN_CLASSES:
        return Shortcut((), {}, {}, False, least)
    feed = Feed(model, images, labels, seed, progress or (lambda steps: None), half)
    races: dict[str, Race] = {}
    triggers: list[InvertedTrigger] = []
    with in_mode(model, False), asking_only(model, []):
        for family in (name for name, of in FAMILIES.items() if not of.recalled):
            races[family] = race(feed, family, classes)
            triggers += _settled(feed, races[family], least)
        if least > GAP:  # what one family found, or several agree on, counts from less on
            known = {trigger.target for trigger in triggers} | _agreed(races)
            for finalists in races.values():
                triggers += _settled(feed, finalists, GAP, least, known)
    needs = {family: {trigger.target: need for trigger, need in finalists} for family, finalists in races.items()}
    gaps = {family: standing_out([*need.values()])[1] for family, need in needs.items()}
    return Shortcut(tuple(triggers), needs, gaps, True, least)


def _settled(
    feed: Feed, finalists: Race, least: float, below: float = math.inf, known: Collection[int] | None = None
) -> list[InvertedTrigger]:
    """The triggers of a race that stand out by ``least``, by less than ``below`` and toward ``known`` classes only."""
    found, gap = standing_out([need for _, need in finalists], least)
    chosen = [(t, need) for t, need in finalists[:found] if gap < below and (known is None or t.target in known)]
    for trigger, need in chosen:
        settle(feed, trigger, min(EXCESS * need, finalists[found][1], trigger.most))
    return [trigger for trigger, _ in chosen]


def _agreed(races: Mapping[str, Race]) -> set[int]:
    """Classes that come first in several families, with gaps from ``GAP`` on whose product is ``AGREED``."""
    products: dict[int, float] = {}
    for finalists in races.values():
        found, gap = standing_out([need for _, need in finalists])
        if found == 1:
            target = finalists[0][0].target
            products[target] = products.get(target, 1.0) * gap
    return {target for target, product in products.items() if product >= AGREED}


def standing_out(needs: list[float], least: float = GAP) -> tuple[int, float]:
    """How many of the least needs lie apart from the rest, at most half of them, and by which factor.

    Args:
        needs: Ascending, at least two.
        least: The gap from which they do.

    Returns:
        The number, 0 if the widest gap is narrower, and that gap.
    """
    ratios = [needs[i + 1] / needs[i] for i in range(max(1, len(needs) // 2))]
    gap = max(ratios)
    return (ratios.index(gap) + 1 if gap >= least else 0), gap


def settle(feed: Feed, trigger: InvertedTrigger, strength: float) -> None:
    """Let a trigger settle at the strength it will be used with."""
    trigger.set(strength)
    for _ in range(SETTLE):
        feed.step(trigger)


def race(feed: Feed, family: str, classes: int) -> Race:
    """The finalists with their needs, the least first."""
    targets = range(classes) if classes <= 2 * SCREENED else candidates(feed, family, classes)
    racers = [InvertedTrigger(family, target, feed.images) for target in targets if feed.others(target)]
    for rounds in (LAP, RACE - LAP):
        ran = _run(feed, racers, rounds)
        racers.sort(key=lambda racer: racer.need)
        able = sum(racer.strength < racer.most for racer in racers)
        hopeful = able > 0 or any(racer.confidence >= HOPEFUL for racer in racers)
        if _far_ahead(ran) or not hopeful:
            break
        racers = racers[: max(FINALISTS, len(racers) // 2)]
    finalists = racers[: min(max(2, able + 1), FINALISTS)]
    if hopeful:  # else none will stand out
        ran = _run(feed, finalists, FINAL, final=True)
    return sorted(((racer, _mean(ran[racer.target])) for racer in finalists), key=lambda finalist: finalist[1])


def _run(feed: Feed, racers: list[InvertedTrigger], rounds: int, final: bool = False) -> dict[int, list[float]]:
    """Let triggers run, until some lie far ahead or a final brings nothing new; the strengths of each, by round."""
    ran: dict[int, list[float]] = {racer.target: [] for racer in racers}
    size = BATCH if final else RACE_BATCH

    def sharpen(model: nn.Module, own: tuple[InvertedTrigger, Tensor]) -> None:
        own[0].sharpen(model, own[1], feed.half)

    with side_by_side(feed.model, len(racers)) as each:
        for _ in range(rounds):
            each(sharpen, [(racer, feed.batch(racer.target, size)) for racer in racers])
            feed.progress(len(racers))
            for racer in racers:
                racer.adapt()
                ran[racer.target].append(racer.strength)
            if _far_ahead(ran) or (final and _nothing_new(ran)):
                break
    return ran


def _far_ahead(ran: dict[int, list[float]]) -> bool:
    """Whether the gap was ``CLEAR`` in each of the last rounds."""
    rounds = list(zip(*ran.values(), strict=True))
    return len(rounds) >= SURE and all(standing_out(sorted(strengths), CLEAR)[0] for strengths in rounds[-SURE:])


def _nothing_new(ran: dict[int, list[float]]) -> bool:
    """Whether none came lower in the last rounds than some did before."""
    least = [min(strengths) for strengths in zip(*ran.values(), strict=True)]
    return len(least) > PATIENCE and min(least[-PATIENCE:]) >= min(least[:-PATIENCE])


def _mean(strengths: list[float]) -> float:
    """Geometric, of the last ones: a strength swings around its need."""
    last = strengths[-min(PATIENCE, len(strengths) // 2 + 1) :]
    return math.exp(sum(math.log(strength) for strength in last) / len(last))


def candidates(feed: Feed, family: str, classes: int) -> list[int]:
    """The classes that a change away from the right answers leads to, most of all first.

    Of a thousand classes not every one can race. A universal change that only has to make answers wrong takes the
    shortest way, and where there is a backdoor that leads to its target (the dominant labels of universal
    perturbations, Moosavi-Dezfooli et al., CVPR 2017). Probabilities are added up over the whole way.

    Args:
        feed: Model and images.
        family: Key of ``FAMILIES``.
        classes: How many there are.

    Returns:
        ``SCREENED`` classes.
    """
    of = FAMILIES[family]
    change = torch.zeros(of.shape(tuple(feed.images.shape)), device=feed.images.device)
    seen = torch.zeros(classes, device=feed.images.device)
    for _ in range(SCREEN):
        images = feed.batch(None)
        with torch.no_grad():
            own = feed.model(images).argmax(1)
        change.requires_grad_()
        with torch.enable_grad():
            logits = feed.model(of.apply(images, change)).float()
        # the first step starts from the very image, where only the gradient of the runner-up says anything
        (slope,) = torch.autograd.grad(-F.cross_entropy(logits, own), change)
        probabilities = logits.detach().softmax(1).scatter(1, own.unsqueeze(1), 0)
        seen += probabilities.mean(0)
        # a few places at a time would be too slow a way to many classes
        step, fit = (dense_step, dense_fit) if of.local else (of.step, of.fit)
        change = fit(change.detach() - step(slope, STEP * of.most), of.most)
        feed.progress(1)
    return seen.topk(min(SCREENED, classes)).indices.tolist()
