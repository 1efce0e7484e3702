"""Everything a sanitize run can be told, in one frozen record; read from TOML strictly, and written as TOML.

A file of settings is ``bshub.toml``, or the table ``[tool.bshub]`` of a ``pyproject.toml``. Its keys are the names of
the record. Nothing is guessed: an unknown or repeated key, a value of another kind and NaN are refused.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bshub.errors import UsageError, printable

FILE = "bshub.toml"
OURS = ("bshub", "paper")  # methods; every other is a published baseline
MOST_SHRINK = 0.9
_PROJECT = "pyproject.toml"
_MAX_BYTES = 1 << 20
_CORRECT = "correct it on the command line or in the file of settings"


@dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Attributes:
        method: ``bshub``; ``paper``, the reconstruction of arXiv 2311.07417, which fixes score and repair; or a key of
            ``DEFENSES``, a published baseline.
        score: Key of ``SCORES``; which filters look suspicious.
        mu: Threshold ``mean + mu · std`` per layer, or ``auto``: the lowest one within ``budget``, or the highest at
            which an inverted trigger fails; nothing where none was found.
        budget: Accuracy on the clean images, in points, that pruning may cost before the repair (``auto``, ``shrink``).
            Once a trigger was found on made-up images, ten times as many points of agreement on most of them.
        repair: Key of ``REPAIRS``.
        finetune_epochs: Passes over the clean images after the surgery; 0.8 times as many where an inverted
            trigger is unlearned, which shows each batch twice, but no fewer than 24 steps.
        finetune_lr: Peak learning rate of these passes; four times as much where an inverted trigger is unlearned.
        batch_size: Images per batch.
        seed: Seed of everything random.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        precision: Of the passes that search for a trigger and repair: ``fp32``, ``bf16`` (autocast; weights stay
            float32), or ``auto``, bf16 where that takes less time. Statistics, threshold and proof are in float32.
        effort: Share of a baseline's published iterations, 1 = as published; ours has none.
        shrink: Largest share of the filters that leave beside the suspicious ones because they are of little use, as
            far as the budget allows; 0 = none. Not for baselines.
        harden: Whether a network in which nothing was found is made indifferent to faint waves, as far as 96 % of
            mixtures of the clean images, which have to show every class, are answered as before.
    """

    method: str = "bshub"
    score: str = "tac"
    mu: float | str = "auto"
    budget: float = 5.0
    repair: str = "distil"
    finetune_epochs: int = 10
    finetune_lr: float = 0.002
    batch_size: int = 32
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    effort: float = 1.0
    shrink: float = 0.0
    harden: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be; NaN is never a setting."""
        for name in ("method", "score", "repair", "device"):
            if not isinstance(getattr(self, name), str):
                raise UsageError(
                    f"{name} must be a name, not {getattr(self, name)!r}",
                    hint=_CORRECT,
                )
        numbers = {"budget": self.budget, "finetune_lr": self.finetune_lr, "effort": self.effort, "shrink": self.shrink}
        numbers |= {} if self.mu == "auto" else {"mu": self.mu}  # type: ignore[dict-item]
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                kind = "a number or 'auto'" if name == "mu" else "a number"
                raise UsageError(
                    f"{name} must be {kind}, not {value!r}",
                    hint=_CORRECT,
                )
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UsageError(f"precision is auto, fp32 or bf16, not {self.precision!r}", hint=_CORRECT)
        if not isinstance(self.harden, bool):
            raise UsageError(f"harden is true or false, not {self.harden!r}", hint=_CORRECT)
        if not 0 <= self.budget <= 100:
            raise UsageError(
                f"budget is accuracy in points, 0 to 100, not {self.budget!r}",
                hint=_CORRECT,
            )
        if not 0 < self.finetune_lr <= 10:
            raise UsageError(
                f"finetune_lr must lie above 0 and not above 10, not {self.finetune_lr!r}",
                hint=_CORRECT,
            )
        if not 0 < self.effort <= 100:
            raise UsageError(
                f"effort must lie above 0 and not above 100, not {self.effort!r}",
                hint=_CORRECT,
            )
        if not 0 <= self.shrink <= MOST_SHRINK:
            raise UsageError(
                f"shrink is a share of the filters, 0 to {MOST_SHRINK:g}, not {self.shrink!r}",
                hint=_CORRECT,
            )
        if self.shrink and self.method not in OURS:
            raise UsageError(
                f"shrink does not go with method {self.method!r}: a published baseline does what it does",
                hint="leave --shrink or --method away",
            )
        for name, low, high in (("finetune_epochs", 0, 10_000), ("batch_size", 1, 2**20), ("seed", 0, 2**63 - 1)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise UsageError(
                    f"{name} must be a whole number from {low} to {high}, not {value!r}",
                    hint=_CORRECT,
                )

    def resolved(self) -> Settings:
        """With what the method fixes: the paper scores by four statistics and fine-tunes on the labels, in float32."""
        if self.method != "paper":
            return self
        precision = "fp32" if self.precision == "auto" else self.precision
        return replace(self, score="bss", repair="finetune", precision=precision)

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)

    def as_toml(self) -> str:
        """The settings as a ``bshub.toml``."""
        # A JSON string, number or word is a TOML value, except that TOML wants DEL escaped.
        values = {name: json.dumps(value, ensure_ascii=False) for name, value in asdict(self).items()}
        return "".join(f"{name} = {value}\n" for name, value in values.items()).replace("\x7f", "\\u007f")


def read_settings(path: Path) -> dict[str, Any]:
    """Read a file of settings.

    Args:
        path: ``bshub.toml``, or a ``pyproject.toml`` with a table ``[tool.bshub]``.

    Returns:
        The settings that it states, each of them possible.

    Raises:
        UsageError: It cannot be read, is no TOML, or states something that is no setting.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError("larger than 1 MiB")
        table: Any = tomllib.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} is not a file of settings: {reason}", hint="write it in TOML: mu = 2.5") from None
    if path.name == _PROJECT:
        table = _inner(_inner(table, "tool"), "bshub")
        if table is None:
            raise UsageError(f"{path} has no table [tool.bshub]", hint=f"add one, or give a {FILE}")
    return _checked(table, str(path))


def find_settings(folder: Path) -> Path | None:
    """The file of settings of a folder: ``bshub.toml``, else a ``pyproject.toml`` that has ``[tool.bshub]``.

    Raises:
        UsageError: There is a ``pyproject.toml`` that speaks of bshub and is no TOML.
    """
    if (folder / FILE).is_file():
        return folder / FILE
    project = folder / _PROJECT
    try:
        text = project.read_text(encoding="utf-8") if project.is_file() else ""
    except (OSError, ValueError):
        return None  # somebody else's file, and nothing of ours can be seen in it
    if "bshub" not in text:
        return None
    try:
        return project if _inner(_inner(tomllib.loads(text), "tool"), "bshub") is not None else None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{project} is not TOML: {error}", hint="mend it, or name a file with --config") from None


def _inner(table: Any, key: str) -> Any:
    return table.get(key) if isinstance(table, dict) else None


def _checked(table: Any, origin: str) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise UsageError(f"{origin}: [tool.bshub] is not a table", hint="write [tool.bshub] and keys below it")
    known = [field.name for field in fields(Settings)]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise UsageError(
                f"{origin}: {printable(key, 60)!r} is not a setting",
                hint=f"did you mean {near[0]}?" if near else f"settings are {', '.join(known)}",
            )
    try:
        Settings(**table)
    except UsageError as error:
        raise UsageError(f"{origin}: {error.message}", hint=error.hint) from None
    return dict(table)
