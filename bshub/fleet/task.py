"""One model of a fleet, in a worker: idempotent, within its memory, and always a record at the end."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bshub.errors import BshubError, OutputError, printable, redacted
from bshub.fleet.entries import Entry
from bshub.fleet.store import Store
from bshub.release.wording import hardened
from bshub.settings import Settings

VERSION = 1  # of what a key stands for


@dataclass(frozen=True)
class Job:
    """What all models of a fleet have in common; plain values, for it travels to every worker.

    Attributes:
        clean_dir: Clean images, readable on every node.
        clean_digest: Of those images.
        settings: Of every run.
        output: Place of the results.
        test_dir: Images to measure on.
        onnx: Whether ``model.onnx`` is written.
        page: Whether ``report.html`` is written.
        unlabelled: Take each model's own answers for labels.
        threads: CPU threads of one model.
        memory_bytes: Most memory that one model may take on top of what the worker holds; None: no limit.
    """

    clean_dir: str
    clean_digest: str
    settings: Settings
    output: str
    test_dir: str | None = None
    onnx: bool = True
    page: bool = True
    unlabelled: bool = False
    threads: int = 1
    memory_bytes: int | None = None

    def key(self, fingerprint: str) -> str:
        """Digest of everything that decides the result: weights, images and settings, not where it is computed."""
        settings = {name: value for name, value in asdict(self.settings).items() if name != "device"}
        parts = [
            VERSION,
            fingerprint,
            self.clean_digest,
            settings,
            self.test_dir,
            self.onnx,
            self.page,
            self.unlabelled,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def identify(entry: Entry, job: Job) -> dict[str, Any]:
    """The key of a model, or the record of why it has none.

    Returns:
        ``{"key": …}``, and the whole record where one was written before or the reference leads nowhere.
    """
    from bshub.intake.fingerprint import fingerprint

    start = time.perf_counter()
    try:
        key = job.key(fingerprint(entry.reference, arch=entry.arch, num_classes=entry.num_classes))
    except BshubError as error:
        return _failed(entry, "", "refused", error, start)
    except Exception as error:
        return _failed(entry, "", "failed", error, start)
    return {"key": key, **(Store(job.output).record(key) or {})}


def clean(entry: Entry, key: str, job: Job) -> dict[str, Any]:
    """Sanitize one model unless it is done; the record says how it ended.

    Returns:
        The record, which is also written to the store. ``state`` is ``cleaned``, ``hardened`` or
        ``unchanged`` (nothing looked suspicious), ``refused`` (a typed error: the same again whoever tries) or
        ``failed`` (anything else).
    """
    store = Store(job.output)
    done = store.record(key)
    if done is not None:
        return done
    start = time.perf_counter()
    folder = folder_name(entry.reference, key)
    try:
        # killed between artifact and record: the work is not done again
        report = store.manifest(folder)
        if report is None:
            with _limited(job.memory_bytes):
                report = _sanitize(entry, job, store, folder)
        row = {**_head(entry, key, start), **summary(report), "folder": f"models/{folder}"}
    except OutputError as error:  # the place is at fault, not the model
        row = _failed(entry, key, "failed", error, start)
    except BshubError as error:
        row = _failed(entry, key, "refused", error, start)
    except MemoryError:
        row = _failed(entry, key, "failed", MemoryError("more memory than it may take"), start)
    except Exception as error:
        row = _failed(entry, key, "failed", error, start)
    if row["state"] != "failed":  # a failure is tried again by the next run
        store.write_record(row)
    return row


def folder_name(reference: str, key: str) -> str:
    """A folder for a reference: its last part in letters that are safe anywhere, and the beginning of the key."""
    last = reference.partition("?")[0].rstrip("/").replace("\\", "/").rpartition("/")[2]
    safe = "".join(ch if ch.isascii() and (ch.isalnum() or ch in "._-") else "_" for ch in last).strip(".")
    return f"{safe[:60] or 'model'}-{key[:16]}"


def _sanitize(entry: Entry, job: Job, store: Store, folder: str) -> dict[str, Any]:
    import torch

    from bshub.commands import sanitize_to_folder
    from bshub.inputs import Inputs
    from bshub.writing import Wishes

    torch.set_num_threads(job.threads)
    inputs = Inputs(
        entry.reference,
        entry.arch,
        entry.num_classes,
        Path(job.clean_dir),
        Path(job.test_dir) if job.test_dir else None,
        unlabelled=job.unlabelled,
    )
    wishes = Wishes(onnx=job.onnx, page=job.page)
    if store.local is not None:
        place = Path(store.path("models", folder))
        return sanitize_to_folder(inputs, job.settings, place, overwrite=True, wishes=wishes)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "artifact"
        report = sanitize_to_folder(inputs, job.settings, place, wishes=wishes)
        store.upload(place, folder)
    return report


def _state(report: dict[str, Any]) -> str:
    if hardened(report):
        return "hardened"
    return "cleaned" if report["counts"]["flagged"] or report["repaired"] else "unchanged"


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of an artifact's report that a row of the summary holds."""
    rates = report["clean_images"]
    tested = report.get("evaluation")
    return {
        "state": _state(report),
        "architecture": report["model"]["architecture"],
        "classes": report["model"]["num_classes"],
        "filters": report["diagnosis"]["filters"],
        "mu": report["diagnosis"]["threshold"]["mu"],
        **{name: report["counts"][name] for name in ("flagged", "removed", "silenced")},
        "clean_images": rates["n"],
        "accuracy_before": rates["accuracy_before"]["percent"],
        "accuracy_after": rates["accuracy_after"]["percent"],
        "test_accuracy_before": tested["before"]["accuracy"]["percent"] if tested else None,
        "test_accuracy_after": tested["after"]["accuracy"]["percent"] if tested else None,
        "parameters_before": report["parameters"]["before"],
        "parameters_after": report["parameters"]["after"],
        "warnings": len(report["warnings"]),
        "page": "page" in report,
    }


def _head(entry: Entry, key: str, start: float) -> dict[str, Any]:
    return {
        "reference": printable(entry.reference, 1000),
        "key": key,
        "state": "",
        "reason": "",
        "seconds": round(time.perf_counter() - start, 2),
        "host": platform.node(),
        "process": os.getpid(),
        "finished": time.time(),
    }


def failed_row(entry: Entry, key: str, reason: str) -> dict[str, Any]:
    """The record of a model whose worker could not say itself what became of it."""
    return {**_head(entry, key, time.perf_counter()), "state": "failed", "reason": reason}


def _failed(entry: Entry, key: str, state: str, error: BaseException, start: float) -> dict[str, Any]:
    reason = error.message if isinstance(error, BshubError) else f"{type(error).__name__}: {error}"
    return {**_head(entry, key, start), "state": state, "reason": printable(redacted(reason))}


@contextmanager
def _limited(extra: int | None) -> Iterator[None]:
    """Cap the process's private memory while one model is worked on; Windows has no such cap."""
    if extra is None or os.name == "nt":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_private_bytes() + extra, before[1]))
    try:
        yield
    except RuntimeError as error:
        if "memory" in str(error).lower():  # how torch says it
            raise MemoryError from None
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _private_bytes() -> int:
    """What RLIMIT_DATA counts already; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return 0
