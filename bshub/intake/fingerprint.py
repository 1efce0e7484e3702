"""What a model reference stands for right now, as one digest: two references to the same bytes have the same."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path

from bshub.errors import ModelReferenceError
from bshub.files import sha256
from bshub.intake.hub import fetch, split_reference
from bshub.intake.models import WEIGHT_FILES, fetch_weights
from bshub.intake.reference import parse_reference


def fingerprint(reference: str, *, arch: str | None = None, num_classes: int | None = None) -> str:
    """Digest of a model's weights and of whatever says how they are to be read.

    The weights are hashed, not opened. A name of timm's or torchvision's own weights stands for them together with the
    library's version.

    Args:
        reference: As for :func:`bshub.intake.models.load_model`.
        arch: Architecture of a weights-only file.
        num_classes: Number of outputs, where nothing else states it.

    Returns:
        64 hexadecimal digits.

    Raises:
        ModelReferenceError: The reference leads nowhere.
    """
    parsed = parse_reference(reference)
    if parsed.architecture is not None:
        library = parsed.architecture.library
        parts = [parsed.text, library, metadata.version(library)]
    elif parsed.path is not None and parsed.path.is_file():
        parts = [_digest(parsed.path)]
    elif parsed.path is not None:
        found = [parsed.path / name for name in WEIGHT_FILES if (parsed.path / name).is_file()]
        if not found or not (parsed.path / "config.json").is_file():
            raise ModelReferenceError(
                f"{parsed.text} is no folder in timm's layout",
                hint="it needs config.json beside " + " or ".join(WEIGHT_FILES),
            )
        parts = [_digest(found[0]), _digest(parsed.path / "config.json")]
    else:
        repository, revision = split_reference(str(parsed.repository))
        parts = [_digest(fetch_weights(repository, revision)), _digest(fetch(repository, "config.json", revision))]
    return hashlib.sha256(json.dumps([parts, arch, num_classes]).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise ModelReferenceError(f"{path} cannot be read: {error.strerror}", hint="look at its rights") from None
