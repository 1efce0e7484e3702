"""Probe every model of ``models.txt`` and write ``docs/coverage.md``.

    python examples/coverage/run.py --out docs/coverage.md [--jobs 2] [--no-onnx] [--no-peer] [--only plain] ...

Each model runs in processes of its own with time limits: the probe, the rebuilding, and Torch-Pruning beside it.
Rows go to ``coverage.jsonl`` beside the page as they are finished; a rerun does what is missing, Torch-Pruning's part
of a row included (``--no-peer`` first does ours for all). The seventh mark
(ONNX) is the slow part; ``--peer-onnx`` asks for Torch-Pruning's too, which is bounded by its *forward* mark.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARKS = ("forward", "exact", "reach", "smaller", "trains", "rebuilt", "onnx")
CPU = {"probe": 300, "rebuilds": 120, "original": 300, "peer": 120}  # seconds of CPU time that a task may take
WALL = 1800
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["warm"])
# for the fork server, which does not take over sys.path
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
KINDS = {"torchvision": "torchvision", "plain": "timm, plain CNNs", "hybrid": "timm, hybrids with attention"}


def models() -> list[tuple[str, str]]:
    """(kind, reference) of every model."""
    lines = (HERE / "models.txt").read_text().split("\n")
    return [(kind, name) for kind, _, name in (line.partition(" ") for line in lines if line)]


@cache
def commit() -> str:
    """The last commit that changed the library, marked where the working tree differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=True).stdout

    root = git("rev-parse", "--show-toplevel").strip()
    changed = git("status", "--porcelain", "--", f"{root}/bshub")
    return git("log", "-1", "--format=%h", "--", f"{root}/bshub").strip() + ("+" if changed else "")


def judge(
    kind: str, name: str, onnx: bool, peer: bool, peer_onnx: bool, row: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One row, whatever happens to the processes; of a row that is there only Torch-Pruning's part may be missing."""
    with tempfile.TemporaryDirectory() as folder:
        if row is None:
            row = alone("probe", name, onnx, folder)
            if "failed" not in row:
                again = alone("rebuilds", name, onnx, folder)
                row["rebuilt"] = again.get("value", False)
                row |= {"rebuilt_error": again["failed"]} if "failed" in again else {}
            row = {"kind": kind, "model": name, "commit": commit(), **row}
        if row.get("onnx") is False and "original_onnx" not in row:
            found = alone("original", name, onnx, folder)
            row["original_onnx"] = found.get("value", False)
            row |= {"original_onnx_error": found["failed"]} if "failed" in found else {}
        if peer and "peer" not in row:
            row = {**row, "peer": alone("peer", name, peer_onnx, folder)}
    return row


def alone(task: str, name: str, onnx: bool, folder: str) -> dict[str, Any]:
    """Run a task in a process of its own, forked from one that has imported the libraries and nothing else."""
    answer = Path(folder) / f"{task}.json"
    process = PROCESSES.Process(target=_child, args=(task, name, onnx, folder, answer))
    process.start()
    process.join(WALL)
    if process.is_alive():
        process.kill()
        process.join()
        return {"failed": f"not finished after {WALL} s"}
    if process.exitcode == -signal.SIGXCPU:
        return {"failed": f"not finished after {CPU[task]} s of CPU time", "cpu": CPU[task]}
    if not answer.exists():
        return {"failed": f"the process ended with {process.exitcode}"}
    return json.loads(answer.read_text())


def _child(task: str, name: str, onnx: bool, folder: str, answer: Path) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + CPU[task]
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    sys.path.insert(0, str(HERE))
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    import peer
    import probe

    work = {
        "probe": lambda: probe.probe(name, onnx, Path(folder)),
        "rebuilds": lambda: {"value": probe.rebuilds(name, Path(folder))},
        "original": lambda: {"value": probe.original_onnx(name)},
        "peer": lambda: peer.peer(name, onnx, Path(folder)),
    }
    try:
        found = work[task]()
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    now = resource.getrusage(resource.RUSAGE_SELF)
    found["cpu"] = round(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, 1)
    answer.write_text(json.dumps(found))


def page(rows: list[dict[str, Any]], total: int) -> str:
    """The Markdown page."""
    carried = sum("carried" in row.get("peer", {}) for row in rows)
    commits = Counter(row.get("commit", "earlier ones, not noted") for row in rows)
    made = ", ".join(f"{name} ({count} rows)" for name, count in commits.most_common())
    lines = [
        "# Coverage",
        "",
        "Generated by `make coverage` from [coverage.jsonl](coverage.jsonl); do not edit by hand.",
        "",
        f"{len(rows)} of {total} models probed: random weights, 15 % of the coupling groups removed at random, and",
        "batch-norm statistics taken from noise images and perturbed. The marks: the *forward* runs, shapes equal ·",
        "*exact*: logits equal the original's with the same channels zeroed at every consumer, 1e-5 relative at most",
        "in float32 · *reach*: at least 90 % of the conv-BN filters may leave physically · *smaller*: fewer weights ·",
        "*trains*: one training step · *rebuilt*: bit-exact from the recipe in a fresh process · *onnx*: checker and",
        "parity.",
        "",
        "Torch-Pruning 1.6.1 prunes the same models at the same fraction in the same run (random importance,",
        "classifier kept, 120 s of CPU time); exact means 1e-6 relative in float64 against the same oracle. Its ONNX",
        "is only run with `--peer-onnx`; it cannot exceed *forward*.",
        "",
        *_exporter(rows),
        *_out_of_time(rows),
        f"The library's commit behind the rows: {made}.",
        *([f"{carried} of Torch-Pruning's rows are from an earlier run of the same script."] if carried else []),
        "",
        "| | models | " + " | ".join(MARKS) + " |",
        "|---|---|" + "---|" * len(MARKS),
    ]
    for kind, title in KINDS.items():
        mine = [row for row in rows if row["kind"] == kind]
        lines.append(f"| **{title}** | {len(mine)} | " + " | ".join(_total(mine, mark) for mark in MARKS) + " |")
        peers = [row["peer"] for row in mine if "peer" in row]
        if peers:
            cells = (_total(peers, mark) if mark not in ("reach", "rebuilt") else "–" for mark in MARKS)
            lines.append(f"| Torch-Pruning on them | {len(peers)} | " + " | ".join(cells) + " |")
    for kind, title in KINDS.items():
        lines += ["", f"## {title}", ""]
        lines.append(
            "| model | marks missed | error | free | trace + surgery s | what stays, and why | Torch-Pruning misses |"
        )
        lines.append("|---|---|---|---|---|---|---|")
        lines += [_line(row) for row in sorted(rows, key=lambda row: row["model"]) if row["kind"] == kind]
    return "\n".join([*lines, ""])


def _exporter(rows: list[dict[str, Any]]) -> list[str]:
    """Whose fault the missed *onnx* is."""
    missed = [row for row in rows if row.get("onnx") is False]
    alike = [row for row in missed if row.get("original_onnx") is False]
    if not missed:
        return []
    names = ", ".join(row["model"].partition("/")[2] for row in alike)
    text = f"Of the {len(missed)} networks that miss *onnx*, {len(alike)} miss it untouched as well"
    return [text + (f" ({names})." if alike else "."), ""]


def _out_of_time(rows: list[dict[str, Any]]) -> list[str]:
    """How many of the peer's misses are its time limit, which a faster machine may not see."""
    late = Counter(row["kind"] for row in rows if "CPU time" in row.get("peer", {}).get("failed", ""))
    if not late:
        return []
    kinds = ", ".join(f"{late[kind]} {title}" for kind, title in KINDS.items() if late[kind])
    return [f"{sum(late.values())} of Torch-Pruning's rows ended at its time limit ({kinds}).", ""]


def _total(rows: list[dict[str, Any]], mark: str) -> str:
    asked = [row for row in rows if mark in row or "failed" in row]
    if not any(mark in row for row in asked):
        return "–"
    return f"{sum(bool(row.get(mark)) for row in asked)}/{len(asked)}"


def _line(row: dict[str, Any]) -> str:
    name, peer = row["model"].partition("/")[2], _peer(row.get("peer"))
    if "failed" in row:
        return f"| {name} | all | | | | {_short(row['failed'])} | {peer} |"
    missed = ", ".join(mark for mark in MARKS if row.get(mark) is False) or "none"
    whys = [row[f"{mark}_error"] for mark in MARKS if f"{mark}_error" in row]
    reasons = [*whys, *row["refused"], *_by_operation(row["reasons"])]
    seconds, free = row["trace"] + row["surgery"], 100 * row["share"]
    cells = [name, missed, f"{row['error']:.1e}", f"{free:.0f} %", f"{seconds:.2f}", _short("; ".join(reasons)), peer]
    return "| " + " | ".join(cells) + " |"


def _peer(row: dict[str, Any] | None) -> str:
    """Its missed marks, or why it failed as a whole."""
    if row is None:
        return "not run"
    if "failed" in row:
        return "all: " + _short(row["failed"], 80)
    return ", ".join(mark for mark in MARKS if row.get(mark) is False) or "none"


def _by_operation(reasons: list[str]) -> list[str]:
    """``bmm sums over … (6 places, first stages.0)`` instead of one entry a module."""
    places: dict[str, list[str]] = {}
    for reason in reasons:
        module, _, why = reason.partition(": ")
        places.setdefault(why, []).append(module)
    return [
        f"{why} ({len(where)} places, first {where[0]})" if len(where) > 1 else f"{why} ({where[0]})"
        for why, where in places.items()
    ]


def _short(text: str, most: int = 300) -> str:
    text = text.replace("|", "/").replace("\n", " ")
    return text if len(text) <= most else text[: most - 1] + "…"


def _whole(row: dict[str, Any], peer: bool) -> bool:
    """Whether nothing of a row is missing."""
    return ("peer" in row or not peer) and (row.get("onnx") is not False or "original_onnx" in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer-onnx", action="store_true")
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--names", nargs="*", help="probe these again")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    store = args.out.with_suffix(".jsonl")
    rows = {row["model"]: row for row in map(json.loads, store.read_text().splitlines())} if store.exists() else {}
    kinds = {name: kind for kind, name in models()}
    done = [] if args.names else [name for name, row in rows.items() if _whole(row, args.peer)]
    asked = args.names or [name for name in kinds if name not in done]
    known = {} if args.names else rows
    todo = [(kinds[name], name) for name in asked if args.only in (None, kinds[name])]
    with ThreadPoolExecutor(args.jobs) as pool, store.open("a") as stream:
        for future in as_completed(
            [
                pool.submit(judge, kind, name, args.onnx, args.peer, args.peer_onnx, known.get(name))
                for kind, name in todo[: args.limit]
            ]
        ):
            row = future.result()
            rows[row["model"]] = row
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            print(row["model"], "failed" if "failed" in row else [m for m in MARKS if row.get(m) is False], flush=True)
    store.write_text("".join(json.dumps(rows[name]) + "\n" for _, name in models() if name in rows))
    args.out.write_text(page(list(rows.values()), len(models())), encoding="utf-8")


if __name__ == "__main__":
    main()
