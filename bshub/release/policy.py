"""What an artifact must be to ship: a policy in TOML, as strict as the settings, and what a record says to it."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bshub.errors import UsageError, printable

_ROUNDED = 0.02  # points: two rates of two decimals

DEFAULT = """\
# What a model must be to ship. Read by `bshub gate ARTIFACT --policy policy.toml`; every key is optional, and a key
# that is left out asks nothing. Rates are in percent.

# Accuracy on the test images, after sanitizing, and what sanitizing may have cost on them (points).
min_accuracy = 50.0
max_accuracy_drop = 5.0

# Attack success rate where the trigger is known. Few models come with one: without it this asks nothing,
# unless require_asr is true.
max_asr = 10.0
require_asr = false

# A rate on a handful of images says little: fewer than this and the answer is "inconclusive".
min_images = 50
# Judge each rate by the unfavourable end of its 95 % interval instead of its middle.
worst_case = false

# `--measure` looks at the weights again; without it a policy that sets max_suspicious is "inconclusive". A filter
# counts as suspicious where its Lipschitz bound lies more than suspicious_mu deviations above the mean of its layer.
# Sound networks have such filters too: set this after a look at your own.
# max_suspicious = 20
suspicious_mu = 4.0

# Methods that count as sanitizing, and the oldest bshub.
methods = ["bshub"]
min_bshub = "0.1.0"

# Days since the model was sanitized.
max_age_days = 180.0

# Who must have signed (bshub sanitize --sign key.pem): a public key, relative to this file, or its fingerprint
# "sha256:…", which is what `openssl pkey -pubin -in pub.pem | sha256sum` prints; the key itself is then given with
# --key. Without a signature a receipt guards against accidents, not against somebody who rewrites it.
# signer = "pub.pem"

# Licences of the base model that may ship; without this key, any and none.
# licences = ["apache-2.0", "mit", "bsd-3-clause"]

# Files that must be part of the artifact: "model.onnx" and "bom.cdx.json" (the bill of materials) are others.
required_files = ["model.safetensors", "config.json", "README.md"]
"""
_MAX_BYTES = 1 << 20
_SEE = "bshub gate --init writes a policy that says what each key takes"
_VERSION = re.compile(r"\d{1,6}(\.\d{1,6}){0,3}")


@dataclass(frozen=True)
class Policy:
    """What is asked; None or empty: not asked.

    Attributes:
        min_accuracy: Percent.
        max_accuracy_drop: Points.
        max_asr: Percent; judged where the attack success rate is known.
        require_asr: Whether an unknown attack success rate is inconclusive.
        min_images: Fewest images behind a rate.
        worst_case: Judge by the unfavourable end of the 95 % interval.
        max_suspicious: Most suspicious filters; known at the depth ``measure`` alone.
        suspicious_mu: Deviations above the layer's mean from which a filter is suspicious.
        methods: Accepted methods of sanitizing.
        min_bshub: Oldest version of bshub.
        max_age_days: Since the run.
        signer: Public key's file, or ``sha256:`` and its fingerprint.
        licences: Allowed ones.
        required_files: Paths in the artifact.
        origin: Where the policy was read.
        sha256: Of its text.
    """

    min_accuracy: float | None = None
    max_accuracy_drop: float | None = None
    max_asr: float | None = None
    require_asr: bool = False
    min_images: int = 0
    worst_case: bool = False
    max_suspicious: int | None = None
    suspicious_mu: float = 4.0
    methods: tuple[str, ...] = ()
    min_bshub: str | None = None
    max_age_days: float | None = None
    signer: str | None = None
    licences: tuple[str, ...] | None = None
    required_files: tuple[str, ...] = ()
    origin: str = field(default="built in", metadata={"told": False})
    sha256: str = field(default="", metadata={"told": False})

    def __post_init__(self) -> None:
        """Refuse what cannot be; NaN is never a bound."""
        for name, high in (("min_accuracy", 100), ("max_accuracy_drop", 100), ("max_asr", 100)):
            _number(name, getattr(self, name), 0, high)
        _number("suspicious_mu", self.suspicious_mu, 0, 1000)
        _number("max_age_days", self.max_age_days, 0, 100_000)
        for name in ("min_images", "max_suspicious"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value <= 2**31):
                raise UsageError(
                    f"{name} must be a whole number from 0, not {value!r}",
                    hint=_SEE,
                )
        for name in ("require_asr", "worst_case"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(
                    f"{name} must be true or false, not {getattr(self, name)!r}",
                    hint=_SEE,
                )
        for name in ("methods", "licences", "required_files"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, tuple) and all(isinstance(item, str) for item in value)):
                raise UsageError(
                    f"{name} must be a list of names, not {value!r}",
                    hint=_SEE,
                )
        for name in ("min_bshub", "signer"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise UsageError(
                    f"{name} must be text, not {value!r}",
                    hint=_SEE,
                )
        if self.min_bshub is not None and not _VERSION.fullmatch(self.min_bshub):
            raise UsageError(
                f"min_bshub must be a version like 0.1.0, not {self.min_bshub!r}",
                hint=_SEE,
            )
        if self.signer and self.signer.startswith("sha256:") and not re.fullmatch(r"sha256:[0-9a-f]{64}", self.signer):
            raise UsageError(
                "signer must be a file, or sha256: and 64 hexadecimal digits",
                hint=_SEE,
            )

    def as_dict(self) -> dict[str, Any]:
        """For reports: what is asked, where it was read and its digest."""
        asked = {item.name: getattr(self, item.name) for item in fields(self) if item.metadata.get("told", True)}
        asked = {key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()}
        return {"origin": self.origin, "sha256": self.sha256, "asks": asked}


def read_policy(path: Path | None) -> Policy:
    """Read a policy.

    Args:
        path: TOML; None: the default that ``bshub gate --init`` writes.

    Raises:
        UsageError: It cannot be read, is no TOML, or asks something that cannot be asked.
    """
    try:
        data = DEFAULT.encode() if path is None else _read(path)
        table = tomllib.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{path} is not a policy: {reason}", hint="bshub gate --init writes one to start from"
        ) from None
    origin = "built in" if path is None else printable(path.name)
    known = [item.name for item in fields(Policy) if item.metadata.get("told", True)]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise UsageError(
                f"{origin}: {printable(key, 60)!r} is not a key of a policy",
                hint=f"did you mean {near[0]}?" if near else f"keys are {', '.join(known)}",
            )
    told: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    signer = told.get("signer")
    if path is not None and isinstance(signer, str) and signer and not signer.startswith("sha256:"):
        told["signer"] = str(path.parent / signer)
    try:
        return Policy(**told, origin=origin, sha256=hashlib.sha256(data).hexdigest())
    except UsageError as error:
        raise UsageError(f"{origin}: {error.message}", hint=error.hint) from None


def _read(path: Path) -> bytes:
    with path.open("rb") as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError("larger than 1 MiB")
    return data


def _number(name: str, value: Any, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UsageError(
            f"{name} must be a number, not {value!r}",
            hint=_SEE,
        )
    if not low <= value <= high:
        raise UsageError(
            f"{name} must lie from {low:g} to {high:g}, not {value!r}",
            hint=_SEE,
        )


def older(version: str, bound: str) -> bool:
    """Whether a version like ``0.1.0`` comes before another; what is no version does.

    A pre-release (``0.2.0rc1``) counts as the number before it: ``0.2.0rc1`` is older than ``0.2.0``.
    """
    match = _VERSION.match(version)
    if not match:
        return True
    have, want = (_padded(text) for text in (match.group(), bound))
    return have < want or (have == want and re.match(r"\.?(a|b|rc|dev)", version[match.end() :]) is not None)


def _padded(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return tuple(parts + [0] * (4 - len(parts)))


def rate_of(record: Mapping[str, Any] | None) -> tuple[float, float, float, int] | None:
    """``(percent, low, high, n)`` of a recorded rate; None where it was not measured or is none."""
    if not isinstance(record, Mapping):
        return None
    values = [record.get(key) for key in ("percent", "low", "high")]
    count = record.get("n")
    if type(count) is not int or count <= 0 or not all(type(value) in (int, float) for value in values):
        return None
    percent, low, high = (float(value) for value in values)  # type: ignore[arg-type]
    return (percent, low, high, count) if 0 <= low <= percent <= high <= 100 else None


def lost_of(evaluation: Any) -> tuple[float, float, float] | None:
    """Accuracy before and after, and the most points that may have been lost (95 %); None where it was not measured.

    Of answers that were compared image by image, where the record has them; else Newcombe's end of two rates.
    """
    if not isinstance(evaluation, Mapping):
        return None
    rates = [evaluation.get(when) for when in ("before", "after")]
    before, after = (rate_of(rate.get("accuracy")) if isinstance(rate, Mapping) else None for rate in rates)
    if before is None or after is None:
        return None
    lost = before[0] - after[0]
    paired = evaluation.get("accuracy_lost")
    high = paired.get("high") if isinstance(paired, Mapping) else None
    if isinstance(high, int | float) and not isinstance(high, bool) and lost - _ROUNDED <= high <= 100:
        return before[0], after[0], float(high)
    return before[0], after[0], lost + math.hypot(before[2] - before[0], after[0] - after[1])
