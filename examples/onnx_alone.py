"""Classify pictures with the exported file and nothing else of ours: onnxruntime, numpy, Pillow.

    python examples/onnx_alone.py out/demo/model.onnx picture.jpg …

Class names and preprocessing stand in the file's metadata (timm's data config, and ``resize``: the size before the
crop).
"""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def prepare(path: str, how: dict) -> np.ndarray:
    """A picture → float32 ``[1, 3, h, w]``: resize, crop the centre, normalise."""
    _, height, width = how["input_size"]
    image = Image.open(path).convert("RGB")
    if how.get("crop_mode") == "squash":
        size = (how["resize"][1], how["resize"][0])
    else:
        ratio = min(image.height / how["resize"][0], image.width / how["resize"][1])
        size = (int(image.width / ratio), int(image.height / ratio))
    image = image.resize(size, Image.Resampling[how["interpolation"].upper()])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    pixels = (pixels - np.array(how["mean"], np.float32)) / np.array(how["std"], np.float32)
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


def main(model: str, pictures: list[str]) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    how, names = json.loads(facts["preprocess"]), json.loads(facts["class_names"])
    for picture in pictures:
        (logits,) = session.run(["logits"], {"images": prepare(picture, how)})
        odds = np.exp(logits[0] - logits[0].max())
        answer = int(odds.argmax())
        print(f"{picture}: {names[answer] if names else answer} ({100 * odds[answer] / odds.sum():.0f} %)")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
