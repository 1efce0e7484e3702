"""Short programs that a model card prints: how to load the model without bshub."""

from __future__ import annotations

from typing import Any

_LOADERS = {
    "timm": """\
import json, timm, torch
from safetensors.torch import load_file

cfg, state = json.load(open("config.json")), load_file("model.safetensors")
model = timm.create_model(cfg["architecture"], num_classes=cfg["num_classes"], **cfg.get("model_args", {}))
""",
    "torchvision": """\
import json, torch, torchvision
from safetensors.torch import load_file

cfg, state = json.load(open("config.json")), load_file("model.safetensors")
name = cfg["architecture"].removeprefix("torchvision/")
model = torchvision.models.get_model(name, num_classes=cfg["num_classes"], **cfg.get("model_args", {}))
""",
}
_CIFAR_STEM = """\
first = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d))
old = model.get_submodule(first)
model.set_submodule(first, torch.nn.Conv2d(3, old.out_channels, 3, 1, 1, bias=old.bias is not None))
pool = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.MaxPool2d))
model.set_submodule(pool, torch.nn.Identity())
"""
_BUFFERS = """\
for name, axes in cfg["bshub"]["kept"].items():
    if name not in state:  # a buffer that the constructor made at its full width
        owner, _, leaf = name.rpartition(".")
        for axis, r in axes.items():
            index = [i for a, b in zip(r[::2], r[1::2]) for i in range(a, b + 1)]
            buffers = model.get_submodule(owner)._buffers
            buffers[leaf] = buffers[leaf].index_select(int(axis), torch.tensor(index))
"""
_REFILL = """\
def refill(module, axis, width, *r):  # zeros at the places of channels that left, while the module slides along them
    kept = torch.tensor([i for a, b in zip(r[::2], r[1::2]) for i in range(a, b + 1)])
    wide = lambda x: x.new_zeros(*x.shape[:axis], width, *x.shape[axis + 1 :]).index_copy(axis, kept, x)
    module.register_forward_pre_hook(lambda m, args: (wide(args[0]),))
    module.register_forward_hook(lambda m, args, y: y.index_select(axis, kept))
for name, places in cfg["bshub"]["refilled"].items():
    refill(model.get_submodule(name), *places)
"""
_NARROW = """\
for name, attributes in cfg["bshub"]["attributes"].items():
    vars(model.get_submodule(name)).update(attributes)
for name, tensor in state.items():
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    store = module._parameters if leaf in module._parameters else module._buffers
    store[leaf] = torch.nn.Parameter(tensor) if store is module._parameters else tensor
model.eval()"""


def loader_text(library: str, stem: str | None, buffers: bool = False, refilled: bool = False) -> str:
    """Python that rebuilds the sanitized network in its own folder, with torch and the model library alone.

    Args:
        library: ``timm`` or ``torchvision``.
        stem: ``cifar`` where the stem was replaced.
        buffers: Whether buffers that no checkpoint holds were narrowed.
        refilled: Whether modules slide along their channels.
    """
    extras = (_CIFAR_STEM if stem else "") + (_BUFFERS if buffers else "") + (_REFILL if refilled else "")
    return _LOADERS[library] + extras + _NARROW


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
