"""Preprocessing as a part of the ONNX graph: uint8 pictures of any size in, logits out.

The graph resizes as Pillow does (``Resize`` with ``antialias``: the same filter in the same fixed-point arithmetic; it
may be off by one grey level, mostly in a few values of a hundred), crops in the middle and normalises,
``(image / 255 - mean) / std``. Pictures of one batch share a size. Only what computes the same is expressed:
bilinear and bicubic resizing, the crop modes ``center`` and ``squash``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bshub.errors import ExportError
from bshub.release.onnx import open_session, opset_of, set_metadata
from bshub.release.onnx_metadata import resized

FILTERS = {"bilinear": "linear", "bicubic": "cubic"}
LEAST_OPSET = 18  # of Resize with antialias
BOUND = 2e-2  # of the largest logit: what one grey level in a few pixels can do

GRAPH = """\
<ir_version: {ir}, opset_import: ["": {opset}]>
preprocess (uint8[batch, height, width, 3] image) => (float[batch, 3, {crop_h}, {crop_w}] images)
<int64[2] box = {{{box_h}, {box_w}}}, int64[2] crop = {{{crop_h}, {crop_w}}}, int64[2] axes = {{2, 3}},
 float half = {{0.5}}, float white = {{255.0}},
 float[1, 3, 1, 1] mean = {{{mean}}}, float[1, 3, 1, 1] std = {{{std}}}>
{{
  planes = Transpose <perm = [0, 3, 1, 2]> (image)
  outer = Shape <end = 2> (planes)
  {sizes}
  all = Concat <axis = 0> (outer, inner)
  small = Resize <mode = "{filter}", antialias = 1, cubic_coeff_a = -0.5, exclude_outside = 1> (planes, , , all)
  excess = Sub (inner, crop)
  exact = Cast <to = 1> (excess)
  middle = Mul (exact, half)
  even = Round (middle)
  first = Cast <to = 7> (even)
  last = Add (first, crop)
  part = Slice (small, first, last, axes)
  grey = Cast <to = 1> (part)
  unit = Div (grey, white)
  centred = Sub (unit, mean)
  images = Div (centred, std)
}}
"""
SHORTER = """\
sides = Shape <start = 2> (planes)
  shorter = ReduceMin <keepdims = 0> (sides)
  scaled = Mul (sides, box)
  inner = Div (scaled, shorter)"""
COVERING = """\
sides = Shape <start = 2> (planes)
  there = Cast <to = 1> (sides)
  wanted = Cast <to = 1> (box)
  ratios = Div (there, wanted)
  ratio = ReduceMin <keepdims = 0> (ratios)
  fitting = Div (there, ratio)
  whole = Round (fitting)
  inner = Cast <to = 7> (whole)"""
PRESSED = "inner = Identity (box)"


def prepend_preprocessing(path: Path, config: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Put the preprocessing before the graph of a file, in place.

    Args:
        path: A file whose only input is ``images``.
        config: timm's data config.
        metadata: Its ``metadata_props`` afterwards.

    Raises:
        ExportError: It cannot be expressed exactly enough.
    """
    import onnx
    from onnx import compose, parser

    mode, interpolation = config.get("crop_mode", "center"), config.get("interpolation", "bilinear")
    if interpolation not in FILTERS or mode not in ("center", "squash"):
        what = f"{interpolation!r} resizing" if interpolation not in FILTERS else f"the crop mode {mode!r}"
        raise ExportError(f"{what} has no equal in ONNX", hint="leave out --with-preprocessing")
    core = onnx.load(str(path), load_external_data=False)
    opset = opset_of(core)
    if opset < LEAST_OPSET:
        raise ExportError(
            f"resizing as Pillow does needs opset {LEAST_OPSET}, not {opset}", hint=f"--opset {LEAST_OPSET}"
        )
    box_h, box_w = resized(config)
    text = GRAPH.format(
        ir=core.ir_version,
        opset=opset,
        box_h=box_h,
        box_w=box_w,
        crop_h=config["input_size"][1],
        crop_w=config["input_size"][2],
        mean=", ".join(f"{float(value):.9g}" for value in config["mean"]),
        std=", ".join(f"{float(value):.9g}" for value in config["std"]),
        filter=FILTERS[interpolation],
        sizes=PRESSED if mode == "squash" else SHORTER if box_h == box_w else COVERING,
    )
    before = parser.parse_model(text)
    del before.opset_import[:]
    before.opset_import.extend(core.opset_import)
    merged = compose.merge_models(
        compose.add_prefix(before, "pre/", rename_inputs=False, rename_outputs=False),
        compose.add_prefix(core, "net/", rename_inputs=False, rename_outputs=False),
        io_map=[("images", "images")],
    )
    set_metadata(merged, metadata)
    onnx.checker.check_model(merged, full_check=True)
    path.write_bytes(merged.SerializeToString())


def compare_pictures(path: Path, pictures: Sequence[Tensor], wanted: np.ndarray) -> tuple[float, bool]:
    """Feed uint8 pictures one by one.

    Args:
        path: A file with preprocessing.
        pictures: uint8 ``(3, h, w)`` each, of any size.
        wanted: Logits ``(n, classes)`` for them.

    Returns:
        ``max |Δ| / max |logit|``, and whether every answer is the same.
    """
    session = open_session(path)
    rows = [session.run(None, {"image": picture.permute(1, 2, 0).numpy()[None]})[0] for picture in pictures]
    ours = np.concatenate(rows)
    scale = max(float(np.abs(wanted).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(ours - wanted).max()) / scale, bool((ours.argmax(1) == wanted.argmax(1)).all())
