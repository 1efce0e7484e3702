"""Experiment 11: what ``--harden`` does to networks in which nothing is found, backdoored or innocent."""

from __future__ import annotations

import textwrap
from typing import Any

from bshub.benchmark.page import DASH, number
from bshub.benchmark.summary import Group, accuracy_drop, mean, rate

HARDENED = "bshub:harden=True"
TAUGHT = (
    (
        "`--harden` is asked for; by default a network in which nothing is found stays as it is. It shows the network "
        "random waves over the clean images for 24 steps, to be answered as before, beside five times as many mixtures "
        "of the images, and goes as far as 96 % of fresh mixtures are answered as before. What no search tells from an "
        "innocent network falls by half where it is a wave (sig-1), and not where it is none (blended-1)."
    ),
    (
        "**The price is seen neither on the clean images nor on mixtures of them.** The innocent network for "
        "photographs pays a few tenths of a point; of three for digits one gains up to 1.4 and one loses up to 2.5 "
        "(section 9). As a default it would meet the bar of 25 with one image per class, and the mean of the innocent "
        "networks would stay within theirs; but who loses two points cannot see it, and most networks that are given "
        "are innocent. An estimate of the loss by the original's own probabilities is no guard: where it comes to 0.2 "
        "points, photographs lose 0.1 and two networks for digits 1.4."
    ),
    (
        "That waves are shown follows from the row of sig-1. How strong they are (0.1 to 0.8 deviations), how many "
        "mixtures there are and how far it goes was chosen on other test images of sig-1, clean, a sinusoid's model "
        "and two innocent ones that are not listed (48 to 37 %; 0.1 to 0.4 points; n=6000); **the bound was 95 % "
        "before rows of clean and sig-1 had been seen**."
    ),
    (
        "Tried and not kept, ten images per class: 48 steps (sig-1 10 % for 0.9 points, an innocent network loses "
        "0.8); the worst of four waves for each image (14.8 for 1.0); two waves at once; slow noise beside them; the "
        "inverted waves of the classes that a wave reaches most easily (sig-1 14.6 for 0.4, blended-1 15.8 of 16.1); "
        "of those only what costs least to unlearn (blended-1 10.6 for 0.2, sig-1 34). What it costs to unlearn the "
        "wave of a class finds no backdoor either: sig-1's target 0.07 to 0.09 nats, the classes of innocent networks "
        "0.02 to 0.28. Nor does it cost less to change only a part of the network: batch norm's scales and shifts, the "
        "convolutions, the first or the last half of the layers, 24 or 48 steps (a sinusoid's model that is not listed "
        "48.6 to 30 to 36 % for 0.2 to 0.9 points, an innocent one loses 0.3 to 0.8; all of it, 24 steps: 32.6 for "
        "0.2, and 0.6; n=3000)."
    ),
)


def was_hardened(notes: dict[str, Any]) -> bool:
    """Whether the weights are hardened ones, and not repaired against something that was found."""
    return bool(notes["repaired"] and "hardening" in notes["seconds"])


def hardening_tables(found: list[Group], wanted: Any) -> list[str]:
    """What it does, in words and as a table.

    Args:
        found: Groups of the experiment.
        wanted: The experiment.

    Returns:
        Lines of Markdown.
    """
    lines: list[str] = []
    for paragraph in TAUGHT:
        lines += [*textwrap.wrap(paragraph, 116), ""]
    return [*lines, *hardening_table(found)]


def hardening_table(found: list[Group]) -> list[str]:
    """A row for each model and number of images, means over the draws in which it was hardened.

    Args:
        found: Groups of any methods.

    Returns:
        Lines of Markdown.
    """
    table = [
        "| model | images per class | draws | hardened | ASR before → after | ACC before → after | ACC lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in sorted(found, key=lambda g: (g.model, -g.per_class)):
        if group.method != HARDENED or not group.rows:
            continue
        done = sum(was_hardened(row["notes"]) for row in group.rows)
        asr, accuracy = (
            " → ".join(number(group.mean(rate(when, name))) for when in ("before", "after"))
            for name in ("asr", "accuracy")
        )
        asr = asr if group.mean(rate("before", "asr")) is not None else DASH
        lost = number(mean(accuracy_drop(row) for row in group.rows))
        cells = group.model, str(group.per_class), str(len(group.rows)), str(done), asr, accuracy, lost
        table.append(f"| {' | '.join(cells)} |")
    return table
