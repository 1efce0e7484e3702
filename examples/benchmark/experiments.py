"""Run the experiments of the benchmark on the zoo and write ``docs/results.md``.

    python examples/benchmark/experiments.py --zoo out/zoo --data out/zoo/data-50000 --out docs/results.md \
        [--only 1 3] [--effort 0.1] [--seeds 0,1,2] [--test-images 2000] [--page]

Rows go to ``results/rows.jsonl`` beside the page as they are measured; what is there is not measured again, so the
command may be killed and repeated. ``--page`` only writes the page. Models that are not trained yet are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from demo import as_victim
from hardening_page import HARDENED
from left_out import left_out_methods, run_left_out
from results_page import page
from shorten import SHORT, as_short_victim
from zoo import DATA

from bshub.benchmark.evidence import judge_statistics
from bshub.benchmark.grid import Grid, chosen_tests, open_victim, run_grid
from bshub.benchmark.rows import Rows
from bshub.intake.folders import open_folder
from bshub.progress import Steps

RATES = ("10", "1")
ATTACKS = ("badnets", "blended", "wanet", "sig", "input-aware", "label-consistent")
ATTACKED = tuple(f"{attack}-{rate}" for rate in RATES for attack in ATTACKS)
LEARNED = "anp awm i-bau nad ft ft-sam tsbd ims rnp fine-pruning"
AS_PUBLISHED = (
    "ft fine-pruning nad nad:lr=0.01,epochs=10 anp ft-sam ft:lr=0.05 clp clp:u=2.5 bnp i-bau i-bau:lr=0.001 rnp"
)
LEFT_OUT_BY_SETTING = "bshub:score=lipschitz bshub:mu=1000000.0 bshub:finetune_epochs=0 bshub:repair=finetune"
LEFT_OUT = " ".join((LEFT_OUT_BY_SETTING, *left_out_methods()))
DIGITS = tuple(
    f"digits-{n}"
    for n in (
        "badnets-10",
        "blended-10",
        "wanet-10",
        "sig-5",
        "input-aware-10",
        "adaptive-10",
        "clean",
        "clean-3",
        "clean-4",
    )
)
MU = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)


@dataclass(frozen=True)
class Experiment:
    """One part of the grid.

    Attributes:
        models: Names of the zoo.
        methods: Separated by spaces.
        per_class: Clean images per class.
        data: A data set of their own.
        effort: Share of the published iterations, where it is not the command's.
    """

    models: tuple[str, ...]
    methods: str
    per_class: tuple[int, ...]
    data: Path | None = None
    effort: float | None = None


EXPERIMENTS: dict[str, Experiment] = {
    "1": Experiment(("badnets-1",), "bshub paper", (1, 10)),
    "2": Experiment(("badnets-10", "blended-10"), " ".join(f"bshub:mu={mu}" for mu in MU) + " bshub", (10,)),
    "3": Experiment((*ATTACKED, "clean"), f"bshub paper clp bnp {LEARNED}", (10,)),
    "4": Experiment((*ATTACKED, "badnets-0.3"), "bshub paper", (1, 5, 10, 25, 50)),
    "5": Experiment(("vgg-badnets-10", "densenet-badnets-10", "resnet34-badnets-10", "mobilenet-badnets-10", "clean"),
                    "bshub paper clp", (10,)),
    "7": Experiment((*ATTACKED, "adaptive-10", "clean"), f"bshub {LEFT_OUT}", (10, 1, 0)),
    "8": Experiment((*(f"px64-{name}" for name in ATTACKED), "px64-clean"), "bshub clp bnp ft nad", (10, 1, 0)),
    "9": Experiment(DIGITS, f"bshub paper clp bnp ft nad {HARDENED}", (10, 1), DATA["digits"][0]),
    "10": Experiment(("badnets-10", "badnets-white-10", "demo", SHORT), AS_PUBLISHED, (250,), effort=1.0),
    "11": Experiment(("sig-1", "blended-1", "wanet-1", "input-aware-1", "clean"), HARDENED, (10, 1)),
}  # fmt: skip


def run(name: str, zoo: Path, data: Path, rows: Rows, args: argparse.Namespace) -> None:
    """Measure what is missing of one experiment."""
    wanted = EXPERIMENTS[name]
    if "demo" in wanted.models:
        as_short_victim(as_victim(zoo / "demo", data / "train"), zoo / SHORT)
    models = tuple(zoo / model for model in wanted.models if (zoo / model / "training.json").exists())
    seeds = tuple(int(seed) for seed in args.seeds.split(","))
    tests, device = args.test_images, args.device
    effort = args.effort if wanted.effort is None else wanted.effort
    methods = wanted.methods.split()
    once = tuple(m for m in methods if m in LEFT_OUT_BY_SETTING.split())  # with as many images as are named first
    parts = tuple(m for m in methods if m in left_out_methods())
    whole = tuple(m for m in methods if m not in once + parts)
    grid = Grid(models, wanted.data or data, whole, wanted.per_class, seeds, tests, effort, device)
    run_grid(grid, rows, Steps(Lines()))
    run_grid(replace(grid, methods=once, per_class=wanted.per_class[:1]), rows, Steps(Lines()))
    for method in parts:
        run_left_out(method, grid, rows, Steps(Lines()))


def judge(zoo: Path, data: Path, out: Path, tests: int) -> None:
    """Experiment 6: every statistic beside the trigger-activated change, a JSON line a model."""
    done = {json.loads(line)["model"] for line in out.read_text().splitlines()} if out.exists() else set()
    for name in ATTACKED:
        if name in done or not (zoo / name / "training.json").exists():
            continue
        victim = open_victim(zoo / name)
        train, test = (
            open_folder(data / split, victim.source.origin.num_classes, victim.source.labels)
            for split in ("train", "test")
        )
        layers = judge_statistics(victim, train, test, chosen_tests(test, tests), 10, 0)
        row = {"model": name, "test_images": tests, "per_class": 10, "layers": [vars(layer) for layer in layers]}
        with out.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(name, "judged", file=sys.stderr, flush=True)


class Lines:
    """A line on stderr a finished row, for a log."""

    @contextmanager
    def step(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show one model."""
        done = 0

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            print(f"{name} {done}/{total}", file=sys.stderr, flush=True)

        yield advance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="holds train/ and test/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=[*EXPERIMENTS, "6"], help="experiments, in this order")
    parser.add_argument("--effort", type=float, default=1.0, help="share of the baselines' published iterations")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = args.out.with_suffix("")
    folder.mkdir(exist_ok=True)
    rows, evidence = Rows(folder / "rows.jsonl"), folder / "evidence.jsonl"
    for name in () if args.page else args.only or (*EXPERIMENTS, "6"):
        if name == "6":
            judge(args.zoo, args.data, evidence, min(args.test_images, 500))
        else:
            run(name, args.zoo, args.data, rows, args)
    found = [json.loads(line) for line in evidence.read_text().splitlines()] if evidence.exists() else []
    args.out.write_text(page(rows.rows, found, EXPERIMENTS, args.out), encoding="utf-8")


if __name__ == "__main__":
    main()
