"""``python -m fuzz SECONDS [TARGET …]``: let atheris look for bytes that break the promise, target after target.

What it finds lies in the folder ``fuzz-findings`` as a file per input; the exit status is that of the first find. The
targets run one after the other in child processes, as libFuzzer never returns.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("checkpoint", "pickle", "image", "text")
MEMORY = 8 << 30  # a hostile size must end as an error, not in the system's memory
PARSERS = [
    "bshub.intake",
    "bshub.settings",
    "bshub.evaluation.attacks.trigger",
    "PIL",
    "json",
    "csv",
    "tomllib",
    "zipfile",
]


def main(arguments: list[str]) -> int:
    """Run every target for its share of the time."""
    names = arguments[1:] or list(NAMES)
    share = max(1, int(float(arguments[0]) / len(names)))
    findings, executions = Path("fuzz-findings").absolute(), dict[str, int]()
    for name in names:
        findings.mkdir(exist_ok=True)
        command = [
            sys.executable, "-m", "fuzz.__main__", "--one", name, f"-max_total_time={share}", "-timeout=300",
            "-report_slow_units=300", "-rss_limit_mb=16384", "-max_len=8192", "-print_final_stats=1",
            f"-artifact_prefix={findings}{os.sep}{name}-",
        ]  # fmt: skip
        status, executions[name] = run(command)
        if status:
            print(f"fuzz: {name} broke the promise; the input is under {findings}", file=sys.stderr)
            return status
    if not any(findings.iterdir()):
        findings.rmdir()
    done = ", ".join(f"{name} {count:,} executions" for name, count in executions.items())
    print(f"fuzz: nothing found in {share} s each: {done}")
    return 0


def run(command: list[str]) -> tuple[int, int]:
    """Run a target, passing on what it prints; gives its exit status and how often the target was executed."""
    count = 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as child:
        assert child.stderr is not None
        for line in child.stderr:
            sys.stderr.write(line)
            if line.startswith("stat::number_of_executed_units:"):
                count = int(line.split()[-1])
    return child.returncode, count


def one(name: str, options: list[str]) -> None:
    """Fuzz one target in this process; does not return."""
    import resource

    import atheris

    with atheris.instrument_imports(include=PARSERS):
        from bshub.intake import quarantine
        from fuzz.targets import TARGETS, seeds

    # by hand: named above, all of torch would be instrumented
    from torch import _utils, serialization
    from torch import _weights_only_unpickler as unpickler

    for function in (unpickler.Unpickler.load, _utils._rebuild_tensor, serialization._load):
        atheris.instrument_func(function)
    for wall in ("limit_process", "forbid_natively", "forbid_python"):  # they hold for good
        setattr(quarantine, wall, lambda *arguments: None)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        corpus, folder = Path(scratch, "corpus"), Path(scratch, "inputs")
        corpus.mkdir()
        folder.mkdir()
        for number, data in enumerate(seeds(name)):
            (corpus / str(number)).write_bytes(data)
            TARGETS[name](data, folder)  # what is imported on the way is no slowness of an input
        atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: TARGETS[name](data, folder))
        atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        one(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main(sys.argv[1:]))
