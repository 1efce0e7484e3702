"""``fleet``: a list of models and a folder of clean images in, artifacts, records and a summary out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bshub.errors import ImageDataError
from bshub.fleet.driver import Cluster, run_fleet, states
from bshub.fleet.entries import folder_digest, read_entries
from bshub.fleet.store import Store
from bshub.fleet.summary import write_summary
from bshub.fleet.task import Job
from bshub.progress import Progress, Steps
from bshub.settings import Settings


def fleet(
    models: Path,
    clean_dir: Path,
    output: str,
    settings: Settings,
    cluster: Cluster,
    *,
    test_dir: Path | None = None,
    onnx: bool = True,
    page: bool = True,
    unlabelled: bool = False,
    threads: int = 1,
    memory_gib: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Sanitize every model of a list.

    Args:
        models: The list, see :func:`bshub.fleet.entries.read_entries`.
        clean_dir: Clean images that all the models can be judged by.
        output: Folder or fsspec URL; what an earlier run finished there is not done again.
        settings: Of every run.
        cluster: Where the work is done.
        test_dir: Images to measure accuracy on.
        onnx: Whether each artifact holds ``model.onnx``.
        page: Whether each artifact holds ``report.html``.
        unlabelled: Take each model's own confident answers for labels.
        threads: CPU threads of one model.
        memory_gib: Most memory of one model.
        progress: Shows the steps.

    Returns:
        ``{"rows": [...], "states": {...}, "output": ...}``; the rows are also ``fleet.parquet`` and ``fleet.html``.

    Raises:
        BshubError: One of its kinds, if the fleet as a whole cannot run; a model's own trouble is a row.
    """
    steps = Steps(progress)
    entries = read_entries(models)
    for folder in (clean_dir, test_dir):
        if folder is not None and not folder.is_dir():
            raise ImageDataError(f"{folder} is not a folder", hint="one folder per class, readable on every node")
    store = Store(output)
    place = str(store.local) if store.local is not None else output
    with steps.step("digest"):
        digest = folder_digest(clean_dir)
    job = Job(
        str(clean_dir.absolute()),
        digest,
        settings,
        place,
        str(test_dir.absolute()) if test_dir else None,
        onnx,
        page,
        unlabelled,
        threads,
        int(memory_gib * 2**30) if memory_gib else None,
    )
    with steps.step("models", len(entries)) as advance:
        rows = run_fleet(entries, job, cluster, advance=advance)
    with steps.step("summary"):
        write_summary(rows, store)
    return {"rows": rows, "states": dict(states(rows)), "output": output, "seconds": steps.seconds}
