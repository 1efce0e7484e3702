"""What a gate has to say: one finding per rule that was looked at, and the verdict that follows from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bshub.errors import printable

PASS, NOTE, INCONCLUSIVE, REFUSED = "pass", "note", "inconclusive", "refused"
CODES = {PASS: 0, NOTE: 0, INCONCLUSIVE: 3, REFUSED: 1}

# Rule → what it asks. The names are stable: alerts, waivers and dashboards are keyed by them.
RULES = {
    "receipt-missing": "The folder holds bshub-report.json, the receipt of a sanitizing run.",
    "receipt-unreadable": "The receipt is a plain JSON file of the known form.",
    "file-missing": "Every file that the receipt lists is there.",
    "file-changed": "Every file has the sha256 that the receipt states.",
    "file-unreadable": "Every file is a regular file that can be read.",
    "file-surplus": "There is no file that the receipt does not list.",
    "file-link": "Nothing is a symbolic link.",
    "file-required": "The files that the policy asks for are part of the artifact.",
    "sanitized": "The receipt is that of a sanitizing run.",
    "signature": "The receipt is signed by the key that the policy names.",
    "policy-changed": "The policy is the one whose digest was given.",
    "age": "The receipt is not older than the policy allows.",
    "method": "The model was sanitized by a method that the policy accepts.",
    "version": "The model was sanitized by a bshub that is new enough.",
    "licence": "The licence is one that the policy allows.",
    "proof": "The surgery was proved: the small network equals the masked one.",
    "onnx-record": "The ONNX file was compared with the weights when it was written.",
    "images": "The rates were measured on enough images.",
    "accuracy": "Accuracy is high enough.",
    "accuracy-drop": "Sanitizing cost no more accuracy than the policy allows.",
    "asr": "The attack success rate of the known trigger is low enough.",
    "loads": "The artifact can be loaded.",
    "onnx-parity": "The ONNX file answers as the weights do.",
    "suspicious-filters": "No more filters look suspicious than the policy allows.",
}


@dataclass(frozen=True)
class Finding:
    """One rule and what came of it.

    Attributes:
        rule: Key of ``RULES``.
        level: ``pass``, ``note`` (not judged, and the policy does not ask for it), ``inconclusive`` or ``refused``.
        message: The reason, one line.
        hint: What to do next.
        path: The file that it is about, relative to the artifact.
        layer: The convolution that it is about.
        channel: Its filter.
    """

    rule: str
    level: str
    message: str
    hint: str | None = None
    path: str | None = None
    layer: str | None = None
    channel: int | None = None

    def __post_init__(self) -> None:
        """A rule nobody can look up, or text that could steer a terminal, is never shown."""
        if self.rule not in RULES or self.level not in CODES:
            raise ValueError(f"{self.rule!r}, {self.level!r}")
        for name in ("message", "hint", "path", "layer"):
            text = getattr(self, name)
            object.__setattr__(self, name, printable(text, 600) if text is not None else None)

    def as_dict(self) -> dict[str, Any]:
        """For reports; what is not known is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Verdict:
    """Whether an artifact may ship.

    Attributes:
        artifact: As it was named.
        depth: ``receipt`` or ``measure``.
        findings: In the order they were looked at.
        weights: sha256 of ``model.safetensors``; None where there is none that could be read.
        policy: Its settings, where they came from, and their sha256.
        folder: Of the artifact; None where there is none.
    """

    artifact: str
    depth: str
    findings: tuple[Finding, ...]
    weights: str | None
    policy: dict[str, Any]
    folder: Path | None = None

    @property
    def code(self) -> int:
        """Exit code: 1 where anything was refused, else 3 where anything could not be examined, else 0."""
        codes = {CODES[finding.level] for finding in self.findings} or {3}  # nothing examined is not a pass
        return 1 if 1 in codes else max(codes)

    @property
    def word(self) -> str:
        """``pass``, ``refused`` or ``inconclusive``."""
        return {0: PASS, 1: REFUSED, 3: INCONCLUSIVE}[self.code]

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return {
            "verdict": self.word,
            "code": self.code,
            "artifact": printable(self.artifact, 4096),
            "depth": self.depth,
            "weights_sha256": self.weights,
            "policy": self.policy,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """What stops the artifact, then what could not be examined, then the rest."""
    order = (REFUSED, INCONCLUSIVE, NOTE, PASS)
    return sorted(findings, key=lambda finding: order.index(finding.level))
