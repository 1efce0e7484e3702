"""Verdict → SARIF 2.1.0, the form in which code hosts take up alerts.

Source: OASIS, Static Analysis Results Interchange Format 2.1.0 plus errata 01. A finding keeps its fingerprint while
weights, rule, file, layer and channel stay the same, so that a waiver outlives the next run and not the next model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from bshub.errors import printable
from bshub.files import MANIFEST
from bshub.release.finding import INCONCLUSIVE, NOTE, REFUSED, RULES, Finding, Verdict

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {REFUSED: "error", INCONCLUSIVE: "warning", NOTE: "note"}


def sarif(verdict: Verdict, version: str) -> dict[str, Any]:
    """A log with one run; what passed is no result, since code hosts would show it as an alert.

    Args:
        verdict: Of the gate.
        version: Of bshub.
    """
    order = list(RULES)
    rules = [
        {
            "id": rule,
            "shortDescription": {"text": text},
            "help": {"text": "docs/gate.md says how to read a refusal."},
            "defaultConfiguration": {"level": "error"},
        }
        for rule, text in RULES.items()
    ]
    run = {
        "tool": {"driver": {"name": "bshub", "semanticVersion": version, "rules": rules}},
        "invocations": [{"executionSuccessful": True, "exitCode": verdict.code}],
        "properties": {"verdict": verdict.word, "depth": verdict.depth, "policySha256": verdict.policy["sha256"]},
        "results": [
            {
                "ruleId": finding.rule,
                "ruleIndex": order.index(finding.rule),
                "level": _LEVELS[finding.level],
                "message": {"text": finding.message + (f" Next: {finding.hint}" if finding.hint else "")},
                "locations": [_location(finding, verdict.folder)],
                "partialFingerprints": {"bshub/v1": fingerprint(finding, verdict.weights)},
            }
            for finding in verdict.findings
            if finding.level in _LEVELS
        ],
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def fingerprint(finding: Finding, weights: str | None) -> str:
    """Hex digest of weights, rule, file, layer and channel."""
    parts = (weights, finding.rule, finding.path, finding.layer, finding.channel)
    return hashlib.sha256("\0".join("" if part is None else str(part) for part in parts).encode()).hexdigest()


def _location(finding: Finding, folder: Path | None) -> dict[str, Any]:
    """The file as seen from where the gate was run, which for a code host is the top of the repository."""
    inside = folder is not None and not folder.is_absolute() and ".." not in folder.parts
    path = PurePosixPath(printable(folder.as_posix()) if folder and inside else "", finding.path or MANIFEST)
    # a region, since code hosts do not show an alert without one
    place: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": {"uri": quote(str(path))}, "region": {"startLine": 1}}
    }
    if finding.layer is not None:
        name = finding.layer if finding.channel is None else f"{finding.layer}[{finding.channel}]"
        place["logicalLocations"] = [{"fullyQualifiedName": name, "kind": "member"}]
    return place
