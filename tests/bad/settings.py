"""46 and 47: settings."""

from __future__ import annotations

from collections.abc import Callable

from bad.bench import Bench, Case, Outcome
from bshub.errors import UsageError


def toml(text: str) -> Callable[[Bench], Outcome]:
    return lambda bench: bench.sanitize(None, "--config", bench.put("bshub.toml", text))


def project(text: str) -> Callable[[Bench], Outcome]:
    return lambda bench: bench.sanitize(None, "--config", bench.put("pyproject.toml", text))


def option(*words: object) -> Callable[[Bench], Outcome]:
    return lambda bench: bench.sanitize(None, *words)


CASES = [
    Case(46, "duplicate key", toml("mu = 2\nmu = 3\n"), UsageError, "is not a file of settings", 2),
    Case(46, "unknown key", toml("finetune_epoch = 2\n"), UsageError, "'finetune_epoch' is not a setting", 2),
    Case(46, "unknown key of a project", project("[tool.bshub]\nmy = 2\n"), UsageError, "'my' is not a setting", 2),
    Case(46, "another kind of value", toml('batch_size = "8"\n'), UsageError, "must be a whole number", 2),
    Case(46, "no TOML", toml("\x00"), UsageError, "is not a file of settings", 2),
    Case(47, "finetune_lr = nan", toml("finetune_lr = nan\n"), UsageError, "must be a number, not nan", 2, silent=True),
    Case(47, "mu = inf", toml("mu = inf\n"), UsageError, "must be a number or 'auto', not inf", 2, silent=True),
    Case(47, "--lr nan", option("--lr", "nan"), UsageError, "must be a number, not nan", 2, silent=True),
]  # fmt: skip
