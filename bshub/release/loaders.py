"""Short programs that a model card prints: how to load the model without bshub."""

from __future__ import annotations

from typing import Any

LINES = 15
_BUILD = {
    "timm": """\
import json, safetensors.torch, timm, torch

cfg, state = json.load(open("config.json")), safetensors.torch.load_file("model.safetensors")
model = timm.create_model(cfg["architecture"], num_classes=cfg["num_classes"], **cfg.get("model_args", {})).eval()
""",
    "torchvision": """\
import json, safetensors.torch, torch, torchvision.models as zoo

cfg, state = json.load(open("config.json")), safetensors.torch.load_file("model.safetensors")
name = cfg["architecture"].removeprefix("torchvision/")
model = zoo.get_model(name, num_classes=cfg["num_classes"], **cfg.get("model_args", {})).eval()
""",
}
_CIFAR_STEM = """\
for kind, side in ((torch.nn.Conv2d, 3), (torch.nn.MaxPool2d, 1)):  # the stem for small images
    for module in [module for module in model.modules() if isinstance(module, kind)][:1]:
        vars(module).update(kernel_size=(side, side), stride=(1, 1), padding=(side // 2, side // 2))
"""
_NARROW = """\
for name, attributes in cfg["bshub"]["attributes"].items():
    vars(model.get_submodule(name)).update(attributes)
"""
_KEPT = """\
kept = lambda r: torch.tensor([i for a, b in zip(r[::2], r[1::2]) for i in range(a, b + 1)])
"""
_REFILL = """\
for name, (a, n, *r) in cfg["bshub"]["refilled"].items():  # zeros where channels left, for what slides along them
    put = lambda m, x, a=a, n=n, k=kept(r): x[0].new_zeros(*x[0].shape[:a], n, *x[0].shape[a+1:]).index_copy(a, k, x[0])
    model.get_submodule(name).register_forward_pre_hook(put)
    model.get_submodule(name).register_forward_hook(lambda m, x, y, a=a, k=kept(r): y.index_select(a, k))
"""
_FILL = """\
for name, tensor in (*model.named_parameters(), *model.named_buffers()):
"""
_BUFFERS = """\
    for axis, r in cfg["bshub"]["kept"].get(name, {}).items():  # what no checkpoint holds has its full width yet
        tensor.data = tensor.index_select(int(axis), kept(r))
"""
_TAKE = """\
    tensor.data = state.get(name, tensor.data)"""


def loader_text(library: str, stem: str | None, buffers: bool = False, refilled: bool = False) -> str:
    """Python that rebuilds the sanitized network in its own folder, with torch and the model library alone.

    Args:
        library: ``timm`` or ``torchvision``.
        stem: ``cifar`` where the stem was replaced.
        buffers: Whether buffers that no checkpoint holds were narrowed.
        refilled: Whether modules slide along their channels.

    Returns:
        The program: at most 15 lines for every network that the library builds.
    """
    parts = {
        _CIFAR_STEM: bool(stem), _NARROW: True, _KEPT: buffers or refilled, _REFILL: refilled,
        _FILL: True, _BUFFERS: buffers, _TAKE: True,
    }  # fmt: skip
    text = _BUILD[library] + "".join(part for part, needed in parts.items() if needed)
    return text if text.count("\n") < LINES else text.replace("\n\n", "\n")


_ONNX = """\
import json, numpy, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
how, names = json.loads(facts["preprocess"]), json.loads(facts["class_names"])
image, (_, h, w) = Image.open("image.jpg").convert("RGB"), how["input_size"]
{size}
image = image.resize(size, Image.Resampling[how["interpolation"].upper()])
left, top = round((image.width - w) / 2), round((image.height - h) / 2)
x = numpy.asarray(image.crop((left, top, left + w, top + h)), "float32") / 255
x = ((x - numpy.array(how["mean"])) / numpy.array(how["std"])).transpose(2, 0, 1)[None].astype("float32")
answer = int(session.run(["logits"], {"images": x})[0].argmax())
print(names[answer] if names else answer)"""
_SIZES = {
    "center": """size = [int(how["resize"][0] * side / min(image.size)) for side in image.size]""",
    "squash": """size = how["resize"][::-1]""",
    "oblong": """\
ratio = min(image.height / how["resize"][0], image.width / how["resize"][1])
size = [round(side / ratio) for side in image.size]""",
}


def onnx_text(config: dict[str, Any]) -> str | None:
    """Python that classifies ``image.jpg`` with ``model.onnx``, onnxruntime, numpy and Pillow alone.

    Args:
        config: timm's data config of the model.

    Returns:
        The program; None for the crop mode ``border``, which takes more than a few lines.
    """
    mode = config.get("crop_mode", "center")
    if mode == "border":
        return None
    _, height, width = config["input_size"]
    return _ONNX.replace("{size}", _SIZES["oblong" if mode == "center" and height != width else mode])
