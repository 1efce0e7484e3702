"""bshub: find the filters of a CNN that could carry a backdoor, remove them, repair and prove the result.

The names below are loaded at first use, so that ``import bshub`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; at run time __getattr__ loads them
    from bshub.errors import BshubError as BshubError
    from bshub.intake.models import LoadedModel as LoadedModel
    from bshub.intake.models import load_model as load  # noqa: F401
    from bshub.pipeline import SanitizeResult as SanitizeResult
    from bshub.pipeline import sanitize as sanitize
    from bshub.pipeline import scan as scan
    from bshub.release.onnx import export_onnx as export_onnx
    from bshub.release.publish import publish as publish
    from bshub.settings import Settings as Settings
    from bshub.stand_ins import StandIns as StandIns

__version__ = "0.1.0"

_PLACES = {
    "BshubError": ("bshub.errors", "BshubError"),
    "LoadedModel": ("bshub.intake.models", "LoadedModel"),
    "SanitizeResult": ("bshub.pipeline", "SanitizeResult"),
    "Settings": ("bshub.settings", "Settings"),
    "StandIns": ("bshub.stand_ins", "StandIns"),
    "export_onnx": ("bshub.release.onnx", "export_onnx"),
    "load": ("bshub.intake.models", "load_model"),
    "publish": ("bshub.release.publish", "publish"),
    "sanitize": ("bshub.pipeline", "sanitize"),
    "scan": ("bshub.pipeline", "scan"),
}

__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'bshub' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
