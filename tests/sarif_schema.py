"""The part of SARIF 2.1.0 that a verdict uses, restated from the standard (OASIS, errata 01), as JSON Schema.

No package of the index ships the official schema, which is not copied here. Objects are closed, so that a property
that the standard does not know, or that is misspelt, is refused; the sections are those of the standard.
"""

from __future__ import annotations

from typing import Any


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


_TEXT = {"type": "string", "minLength": 1}
_MESSAGE = _object(["text"], text=_TEXT)  # 3.11
_LEVEL = {"enum": ["none", "note", "warning", "error"]}  # 3.27.10
_BAG = {"type": "object"}  # 3.8
_RULE = _object(  # 3.49
    ["id"],
    id=_TEXT,
    shortDescription=_MESSAGE,
    help=_MESSAGE,
    defaultConfiguration=_object([], level=_LEVEL),
)
_LOCATION = _object(  # 3.28
    [],
    physicalLocation=_object(
        ["artifactLocation"],
        artifactLocation=_object([], uri={"type": "string", "pattern": r"^[A-Za-z0-9._~%/-]+$"}),
    ),
    logicalLocations={"type": "array", "items": _object([], fullyQualifiedName=_TEXT, kind=_TEXT)},
)
_RESULT = _object(  # 3.27
    ["message"],
    ruleId=_TEXT,
    ruleIndex={"type": "integer", "minimum": -1},
    level=_LEVEL,
    message=_MESSAGE,
    locations={"type": "array", "items": _LOCATION},
    partialFingerprints={"type": "object", "additionalProperties": _TEXT},
)
_INVOCATION = _object(  # 3.20
    ["executionSuccessful"], executionSuccessful={"type": "boolean"}, exitCode={"type": "integer"}
)
_RUN = _object(  # 3.14
    ["tool"],
    tool=_object(["driver"], driver=_object(["name"], name=_TEXT, semanticVersion=_TEXT, rules={"items": _RULE})),
    invocations={
        "type": "array",
        "items": _object(
            ["executionSuccessful"], executionSuccessful={"type": "boolean"}, exitCode={"type": "integer"}
        ),
    },
    properties=_BAG,
    results={"type": "array", "items": _RESULT},
)
SCHEMA = _object(  # 3.13
    ["version", "runs"],
    **{"$schema": {"type": "string", "format": "uri"}, "version": {"const": "2.1.0"}},
    runs={"type": "array", "items": _RUN},
)
