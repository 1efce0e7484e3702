"""The fleet's driver: two tasks per model on Ray, a window of them at a time, crashes and time limits survived.

First every model is identified (its bytes are hashed), then every different key is cleaned once. The driver keeps
nothing that is not in the store: killed at any moment, the next run goes on where the records end.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bshub.device import processors
from bshub.errors import UsageError, printable
from bshub.fleet.entries import Entry
from bshub.fleet.task import Job, clean, failed_row, identify
from bshub.progress import Advance

POLL = 1.0  # seconds between looks at the clock


@dataclass(frozen=True)
class Cluster:
    """Where and how the tasks run.

    Attributes:
        address: Of a Ray cluster; None starts Ray on this machine, for this run alone.
        workers: Models at once on this machine; None: as many as its processors allow. A cluster has its own say.
        retries: How often a model is tried again whose worker died.
        timeout: Seconds that one model may take.
        gpus: GPUs (or a share of one) that each model gets.
    """

    address: str | None = None
    workers: int | None = None
    retries: int = 2
    timeout: float = 3600.0
    gpus: float = 0.0


@dataclass
class _Running:
    stage: str
    entry: Entry
    key: str
    attempt: int
    since: float


@dataclass
class _Book:
    """What is to be done, what runs and what came of it."""

    todo: deque[tuple[str, Entry, str, int]]
    running: dict[Any, _Running] = field(default_factory=dict)
    by_key: dict[str, list[Entry]] = field(default_factory=dict)
    rows: dict[Entry, dict[str, Any]] = field(default_factory=dict)


def run_fleet(entries: Sequence[Entry], job: Job, cluster: Cluster, *, advance: Advance) -> list[dict[str, Any]]:
    """Clean every model of a list.

    Args:
        entries: The models.
        job: What they have in common.
        cluster: Where they are cleaned.
        advance: Called with 1 for each model that has come to its end.

    Returns:
        One record a model, in the order of the list; ``attempts`` says how many workers it took, 0 where an earlier
        run had done it.

    Raises:
        UsageError: Ray is not installed, or the cluster does not answer.
    """
    ray = _ray()
    slots = _connect(ray, cluster, job)
    try:
        tasks = _tasks(ray, cluster, job)
        shared = ray.put(job)
        book = _Book(deque(("identify", entry, "", 1) for entry in entries))
        while book.todo or book.running:
            while book.todo and len(book.running) < slots:
                stage, entry, key, attempt = book.todo.popleft()
                arguments = (entry, shared) if stage == "identify" else (entry, key, shared)
                reference = tasks[stage].remote(*arguments)
                book.running[reference] = _Running(stage, entry, key, attempt, time.monotonic())
            ready, _ = ray.wait(list(book.running), num_returns=1, timeout=POLL)
            for reference in ready:
                _collect(ray, book, reference, cluster, advance)
            for reference, task in list(book.running.items()):
                if time.monotonic() - task.since > cluster.timeout:
                    del book.running[reference]
                    ray.cancel(reference, force=True)
                    _finish(
                        book, task, failed_row(task.entry, task.key, f"not done after {cluster.timeout:g} s"), advance
                    )
        return [book.rows[entry] for entry in entries]
    finally:
        ray.shutdown()


def states(rows: Sequence[dict[str, Any]]) -> Counter[str]:
    """How many models ended how."""
    return Counter(row["state"] for row in rows)


def _collect(ray: Any, book: _Book, reference: Any, cluster: Cluster, advance: Advance) -> None:
    """Take the answer of a task, or send its model round again if the worker died."""
    task = book.running.pop(reference)
    try:
        row = ray.get(reference)
    except ray.exceptions.RayError as error:
        if task.attempt <= cluster.retries and not isinstance(error, ray.exceptions.RayTaskError):
            book.todo.appendleft((task.stage, task.entry, task.key, task.attempt + 1))
            return
        # the first line: Ray's messages go on with advice about its own logs
        why = printable(str(error).strip().partition("\n")[0])
        _finish(book, task, failed_row(task.entry, task.key, f"its worker died {task.attempt} times ({why})"), advance)
        return
    if task.stage == "identify" and "state" not in row:
        alike = book.by_key.setdefault(row["key"], [])
        alike.append(task.entry)
        if len(alike) == 1:
            book.todo.appendleft(("clean", task.entry, row["key"], 1))
        elif alike[0] in book.rows:  # another line of the same bytes is done already
            _note(
                book,
                task.entry,
                {**book.rows[alike[0]], "reference": printable(task.entry.reference, 1000)},
                0,
                advance,
            )
        return
    _finish(book, task, row, advance)


def _finish(book: _Book, task: _Running, row: dict[str, Any], advance: Advance) -> None:
    _note(book, task.entry, row, task.attempt if task.stage == "clean" else 0, advance)
    for entry in book.by_key.get(task.key, [])[1:] if task.stage == "clean" else []:
        _note(book, entry, _of(row, entry), 0, advance)


def _of(row: dict[str, Any], entry: Entry) -> dict[str, Any]:
    """The row of a model with the same key, under this one's name."""
    return {**row, "reference": printable(entry.reference, 1000)}


def _note(book: _Book, entry: Entry, row: dict[str, Any], attempts: int, advance: Advance) -> None:
    book.rows[entry] = {**row, "attempts": attempts}
    advance(1)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported anywhere
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")  # a busy machine is no broken one
    try:
        import ray
    except ImportError:
        raise UsageError("a fleet runs on Ray, which is not installed", hint="pip install 'bshub[fleet]'") from None
    return ray


def _connect(ray: Any, cluster: Cluster, job: Job) -> int:
    """Join or start a cluster; how many models it can work on at once."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if cluster.address is None:
            count = (cluster.workers or max(1, processors() // job.threads)) * job.threads
            ray.init(num_cpus=count, include_dashboard=False, **quiet)
        else:
            ray.init(address=cluster.address, **quiet)
    except Exception as error:  # a boundary: Ray raises plain Exceptions too
        raise UsageError(
            f"Ray does not start or answer: {printable(str(error).strip().partition(chr(10))[0])}",
            hint="without --address it starts on this machine",
        ) from None
    resources = ray.cluster_resources()
    fits = [resources.get("CPU", 0) // job.threads]
    if cluster.gpus:
        fits.append(resources.get("GPU", 0) // cluster.gpus)
    if min(fits) < 1:
        ray.shutdown()
        raise UsageError(
            f"no model fits: each wants {job.threads} processors and {cluster.gpus:g} GPUs",
            hint="lower --threads or --gpus",
        )
    return int(min(fits))


def _tasks(ray: Any, cluster: Cluster, job: Job) -> dict[str, Any]:
    """The two functions as Ray tasks; the driver itself decides what is tried again."""
    options = {"num_cpus": job.threads, "max_retries": 0}
    environment = {"env_vars": {"OMP_NUM_THREADS": str(job.threads)}}
    return {
        "identify": ray.remote(**options, runtime_env=environment)(identify),
        "clean": ray.remote(**options, num_gpus=cluster.gpus, runtime_env=environment)(clean),
    }
