"""An ONNX file, before anything runs it: whole, standing alone, and what the checker calls a model.

onnxruntime opens what the checker refuses (an empty file, weights behind a hard link), so the checker comes first. A
file whose weights lie in other files is refused: their paths may lead anywhere, and bshub writes none.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bshub.errors import ExportError, printable

MAX_BYTES = 2**31 - 1  # protobuf's own limit
_HINT = "export it again: bshub sanitize writes one file that stands alone"


def check_onnx(path: Path) -> None:
    """Check a file on disk.

    Args:
        path: The file.

    Raises:
        ExportError: It is missing, empty, no model, or keeps tensors in other files.
    """
    import onnx

    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode) or not 0 < state.st_size <= MAX_BYTES:
            raise ExportError(f"{path.name} is no ONNX file: {state.st_size} bytes", hint=_HINT)
        proto = onnx.load(str(path), load_external_data=False)
        for tensor in _tensors(proto):
            if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = next((entry.value for entry in tensor.external_data if entry.key == "location"), "nowhere")
                name, place = printable(tensor.name, 60), printable(place, 60)
                raise ExportError(f"{path.name} keeps tensor {name!r} in another file, {place!r}", hint=_HINT)
        onnx.checker.check_model(str(path), full_check=True)
    except ExportError:
        raise
    except Exception as error:  # protobuf's, the checker's, the shape inference's, the file system's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(f"the ONNX checker refuses {path.name}: {printable(reason, 200)}", hint=_HINT) from None


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a message, at any depth: initializers, attributes, subgraphs, functions."""
    import onnx

    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for item in value if field.is_repeated else [value]:
            if isinstance(item, onnx.TensorProto):
                yield item
            else:
                yield from _tensors(item)
