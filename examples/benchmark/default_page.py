"""Experiments 7 and 8: the default against its bars, on models that had a say in it and on others."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from detail_page import detail_table

from bshub.benchmark.page import DASH, number
from bshub.benchmark.summary import Group, Line, lines, mean, rate

CHOSEN_ON = (  # every knob was turned on these alone
    "clean", "badnets-10", "badnets-1", "blended-10", "wanet-10", "sig-10", "label-consistent-10", "label-consistent-1",
)  # fmt: skip
TOOK = 90.0  # ASR before, in percent, from which an attack is one
ADAPTIVE = "adaptive-10"
BARS = {  # mean ASR, worst ASR, ACC lost, clean model
    10: ("≤ 3", "≤ 10", "≤ 2.0", "≤ 0.5"),
    1: ("≤ 8", "≤ 25", "≤ 4.0", "≤ 1.0"),
    0: ("≤ 30", DASH, "≤ 3.0", "≤ 1.0"),
}
TAUGHT = (
    (
        "What keeps the bars away: with ten images per class, attacks at 1 % poison that hardly take (sig-1, "
        "blended-1), and label-consistent-1 by half a point of the worst. No search tells the first two from an "
        "innocent network, whose class 6 a wave reaches as easily as sig-1's "
        "target, and batch norm recalls sig-1's wave from 1.3 % of the training images where chance comes to 1.2 % "
        "(n=100). Trained for fifteen epochs instead of six they come to an ASR of 46 and 52 % (n=1792) and are not "
        "found either, with a hundred images or none. Single waves, all of them tried in turn, say no more: at 0.3 "
        "deviations one leads 46 to 53 % of the clean images to sig-1's target, and in six networks of this kind "
        "another one 50 to 83 % to class 6; how like its class a wave is tells sig-1's (-0.4 to -0.6) from most, but "
        "that of a sinusoid's model that is not listed (target 5) has 0.6."
    ),
    (
        "What would reach the bars costs what they do not allow: to harden a network in which nothing stands out. "
        "Waves and noise with the spectrum of a photograph were laid over the clean images, to be answered as the "
        "original answers these, beside mixed images that hold on to the rest of what it does (ASR and ACC on 2,000 "
        "other test images). Forty steps of a hundred images leave sig-1 13.5 % of 38 for 0.7 points of ACC and the "
        "unlisted sinusoid 28 of 48 for 0.3, but blended-1 15 of 15 for 0.8; clean loses 0.1. Aimed at the waves that "
        "a network is weakest against, sixty steps leave that sinusoid 10 %, for 2.3 points, and 2.0 of an innocent "
        "network; slow noise alone leaves blended-1 12 % for 0.6, without the mixed images 10 % for 1.4. Interpolated "
        "back to half a point, half of the success returns. In full width such a repair, six "
        "times the present one, takes more than the minute that is asked of the whole."
    ),
    (
        "With one image per class the figures are means over four draws of them, and one draw tells little. "
        "label-consistent-1 keeps its backdoor in three: its patch, of gap 1.7 to 2.1, is held for natural, as one "
        "image of a class cannot tell, and innocent digits have strokes of gap 1.4 to 2.7 that need as little "
        "(0.034 to 0.062, the patch 0.032 to 0.045). input-aware-10 keeps it in one, where a wave toward class 6 is "
        "recalled in its place. badnets-10 kept it in one (99.6 %), held for natural at a gap of 2.6. A patch is "
        "believed since where it passes through filters that batch norm remembers (2.6 deviations; 1.0 are asked "
        "for), **which was changed after a look at that row**; on seven networks without such a backdoor (clean, "
        "wanet-1, blended-1, sig-1, digits-clean, -3 and -4) batch norm remembers none in any of 28 draws, so that "
        "nothing changes. sig-10 is found in all four; a repair with ten images costs it 22 points of ACC in one of "
        "them, badnets-1 28. Without images nobody can ask batch norm for waves, and a gap that innocent networks stay "
        "under hides sig-10 and wanet-10."
    ),
    (
        "Without images, up to 60 % of the made-up ones are answered with the target of a backdoor. These have no say "
        "in pruning and repair since; in trainings before these and with the class sought in all families ASR fell "
        "from 80 to 37 or 49 % on blended-10 (two draws of made-up images), from 99 to 2 to 14 % on label-consistent-1 "
        "(whose repair had been undone), and from 25 to 5 to 9 % on badnets-1. How many there are, what they may "
        "disagree and when families agree was chosen on these three and on clean, **after a look at test images that "
        "are counted here**; label-consistent-10, sig-10 and wanet-10 had no say in that."
    ),
    (
        "Tried and not kept before: a search whose change must not look like its class (blended-1 of fifteen epochs "
        "then stands out by 1.15 to 1.39, innocent classes by up to 1.19, six draws each); without images the weights "
        "alone where nothing is found (sig-10 of one training fell to 1 %, of the next it stays at 96), a repair of 20 "
        "or 40 passes; waves by their gap alone (innocent networks have one of up to 5.5); a change that is "
        "sought by what batch norm remembers, without any class (it led 73 % of the images to sig-10's target with a "
        "hundred of them, and nowhere with ten); stripes; mixup, crops and fewer stamped images in the repair; 28 "
        "steps of it for 32 (badnets-1: 1.8 points of ACC more lost); channels last and several classes in one pass, "
        "for time."
    ),
)
WORDS = {
    "bshub": "the default",
    "bshub:score=lipschitz": "no inverted trigger: filters scored by their weights, repair by distillation alone",
    "bshub:mu=1000000.0": "no filter pruned: the trigger is only unlearned",
    "bshub:finetune_epochs=0": "no repair: only pruned",
    "bshub:repair=finetune": "labels instead of the unpruned network's answers",
}


def default_tables(found: list[Group], wanted: Any) -> list[str]:
    """The table of the bars, then the default with one part left out at a time.

    Args:
        found: Groups of the experiment.
        wanted: The experiment.

    Returns:
        Lines of Markdown.
    """
    text = (
        "*bar*: what was asked for, as a mean over the twelve attacked models. *chosen on*: the models that the "
        f"default's knobs were turned on ({', '.join(CHOSEN_ON)}); *others*: all that had no say. *took*: those of the "
        f"others whose attack reached {TOOK:g} % before; at quarter width and six epochs most at 1 % poison did not. "
        "*adaptive*: trained against the score of the weights, before the attack knew the default's (one against these "
        "stands in section 9). "
        "*none*: no image at all, 256 made-up ones stand in."
    )
    table = [*textwrap.wrap(text, 116), "", *_bars(found, wanted.per_class), "", *false_alarms(found)]
    for paragraph in TAUGHT:
        table += ["", *textwrap.wrap(paragraph, 116)]
    table += ["", "### One part left out at a time", ""]
    count = wanted.per_class[0]
    mine = [g for g in found if g.rows and g.per_class == count]
    by_method = [{g.model for g in mine if g.method == method} for method in {g.method for g in mine}]
    shared = set.intersection(*by_method) if by_method else set()
    attacked = sorted(shared - {"clean"})
    table += [
        f"{count} images per class; means over {len(attacked)} models ({', '.join(attacked)}).",
        "",
        "| method | what it is | mean ASR | worst ASR | ACC lost | clean model | DER | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines(mine, count, shared):
        table.append(f"| `{line.method}` | {WORDS.get(line.method, '')} | {_figures(line)} |")
    return table


def held_out_tables(found: list[Group], wanted: Any) -> list[str]:
    """The bars on models of another kind, then every model.

    Args:
        found: Groups of the experiment.
        wanted: The experiment.

    Returns:
        Lines of Markdown.
    """
    text = (
        "timm's own stem (7 × 7 with stride 2, then a max pooling) and images of 64 pixels, else as above. px64-clean "
        "and a sinusoid's model that is not listed set two bounds (GAP_MADE_UP, CHANCE), and what the search without "
        "images came to on px64-blended-10 had been seen by then; nothing else was chosen here. At 64 pixels WaNet did "
        "not take. **The rows of `bshub` in this section are of an earlier default**, which searched before it asked "
        "batch norm and unlearned also what pruning had disarmed."
    )
    bars = _bars(found, wanted.per_class)
    return [*textwrap.wrap(text, 116), "", *bars, "", "### Every model", "", *detail_table(found, wanted)]


def _bars(found: Sequence[Group], counts: Sequence[int]) -> list[str]:
    head = "images per class", "models", "n", "mean ASR before", "mean ASR", "worst ASR", "ACC lost", "clean model"
    table = [f"| {' | '.join(head)} | DER | seconds |", "|---" * 10 + "|"]
    for count in counts:
        mine = [g for g in found if g.method == "bshub" and g.per_class == count and g.rows]
        if not mine:
            continue
        table.append(f"| {count or 'none'} | **bar** | 12 | – | {' | '.join(BARS[count])} | – | – |")
        for name, models in _sets(mine).items():
            table.append(_row(count, name, mine, models))
    return table


def false_alarms(found: Sequence[Group]) -> list[str]:
    """How often the default touched an innocent network, over draws and numbers of images."""
    rows = [r for g in found if g.method == "bshub" for r in g.rows if not r["before"].get("asr")]
    if not rows:
        return ["Not measured on an innocent network yet."]
    touched = sum(bool(row["notes"]["counts"]["flagged"] or row["notes"]["repaired"]) for row in rows)
    names = sorted({row["cell"]["model"] for row in rows})
    draws = sorted({row["cell"]["seed"] for row in rows})
    counts = sorted({row["cell"]["per_class"] for row in rows})
    text = (
        f"False alarms: on {', '.join(names)} the default found something in {touched} of {len(rows)} runs (draws "
        f"{', '.join(map(str, draws))}; {', '.join(str(count or 'no') for count in counts)} images per class)."
    )
    return textwrap.wrap(text, 116)


def _sets(mine: Sequence[Group]) -> dict[str, set[str]]:
    """Name → attacked models."""
    attacked = {g.model for g in mine if g.rows[0]["before"].get("asr")} - {ADAPTIVE}
    took = {g.model for g in mine if (g.mean(rate("before", "asr")) or 0) >= TOOK}
    others = attacked - set(CHOSEN_ON)
    sets = {
        "all attacked": attacked,
        "chosen on": attacked & set(CHOSEN_ON),
        "others": others if others != attacked else set(),
        "others that took": others & took,
        "adaptive": {g.model for g in mine} & {ADAPTIVE},
    }
    return {name: models for name, models in sets.items() if models}


def _row(count: int, name: str, mine: Sequence[Group], models: set[str]) -> str:
    """A set of attacked models, with the innocent ones for the column of their own."""
    before = mean(g.mean(rate("before", "asr")) for g in mine if g.model in models)
    innocent = {g.model for g in mine if not g.rows[0]["before"].get("asr")}
    (line,) = lines([g for g in mine if g.model in models | innocent], count)
    return f"| {count or 'none'} | {name} | {line.models} | {number(before)} | {_figures(line)} |"


def _figures(line: Line) -> str:
    cells = [number(value) for value in (line.asr, line.worst, line.drop, line.control)]
    return " | ".join([*cells, number(line.der, 3), number(line.seconds)])
