"""1 to 17: checkpoints."""

from __future__ import annotations

import argparse
import io
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import nn

from bad.bench import ARCH, Bench, Case, Outcome, make_model
from bshub.errors import CheckpointError, ModelReferenceError
from bshub.files import MANIFEST
from bshub.intake import quarantine


class Payload:
    """A pickle that leaves a file behind when it is run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f'echo ran > "{self.marker}"',)


def payload(bench: Bench, zipped: bool = True) -> Outcome:
    marker, file = bench.bad / "marker", bench.bad / "m.pth"
    torch.save({**bench.state(), "x": Payload(marker)}, file, _use_new_zipfile_serialization=zipped)
    outcome = bench.sanitize(file)
    assert not marker.exists()
    return outcome


def saved(value: Callable[[Bench], object], **how: Any) -> Callable[[Bench], Outcome]:
    """Something written by ``torch.save``, opened by the child process."""

    def run(bench: Bench) -> Outcome:
        torch.save(value(bench), bench.bad / "m.pth", **how)
        return bench.sanitize(bench.bad / "m.pth")

    return run


def converted(value: Callable[[Bench], object]) -> Callable[[Bench], Outcome]:
    """The same through the child's own code in this process, which is quicker; its limits are left out."""

    def run(bench: Bench) -> Outcome:
        for name in ("limit_process", "forbid_natively", "forbid_python"):
            bench.monkeypatch.setattr(quarantine, name, lambda *arguments: None)
        torch.save(value(bench), bench.bad / "m.pth")
        return bench.call(quarantine.convert, bench.bad / "m.pth", bench.bad / "m.safetensors")

    return run


def given(data: Callable[[Bench], bytes], name: str = "m.pth") -> Callable[[Bench], Outcome]:
    """Bytes under a name."""
    return lambda bench: bench.sanitize(bench.put(name, data(bench)))


def torchscript(bench: Bench) -> Outcome:
    torch.jit.save(torch.jit.script(nn.ReLU()), str(bench.bad / "m.pt"))
    return bench.sanitize(bench.bad / "m.pt")


def tar(bench: Bench) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def zipped(state: object) -> bytearray:
    torch.save(state, buffer := io.BytesIO())
    return bytearray(buffer.getvalue())


def bit_flip(bench: Bench) -> bytes:
    data = zipped({"w": torch.full((64,), 0.123)})
    data[data.index(struct.pack("<f", 0.123) * 4) + 7] ^= 1
    return bytes(data)


def bit_flip_in_an_artifact(bench: Bench) -> Outcome:
    folder = make_model(bench.bad / "artifact")
    digest = "0" * 64  # of the bytes before the flip
    (folder / MANIFEST).write_text(json.dumps({"files": {"model.safetensors": {"sha256": digest}}}))
    return bench.sanitize(folder)


def bit_flip_in_the_cache(bench: Bench) -> Outcome:
    bench.hub.seed("them/net", {path.name: path.read_bytes() for path in bench.model.iterdir()})
    assert bench.command("evaluate", "them/net", "--test-dir", bench.clean).code == 0
    (blob,) = (path for path in (bench.root / "cache").rglob("*") if len(path.name) == 64 and path.is_file())
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    return bench.sanitize("them/net")


def stride_0(bench: Bench) -> dict[str, object]:
    return {**bench.state(), "w": torch.zeros(1).expand(10**12)}


def bomb(bench: Bench) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", "x")
        archive.writestr("m/data/0", bytes(100 << 20))
    return buffer.getvalue()


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Bench], Outcome]:
    """Sound weights with one tensor changed, as safetensors."""

    def run(bench: Bench) -> Outcome:
        state = bench.state()
        state[name] = change(state[name]).contiguous()
        return bench.sanitize(bench.put("m.safetensors", safetensors.torch.save(state)))

    return run


def one_bad_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.flatten()[1] = value
        return tensor

    return change


def prefixed(prefix: str) -> Callable[[Bench], Outcome]:
    """The known prefix goes: the answers are those of the plain file."""

    def run(bench: Bench) -> Outcome:
        rates = []
        for name, before in (("plain", ""), ("prefixed", prefix)):
            state = {before + key: value for key, value in bench.state().items()}
            file = bench.put(f"{name}.safetensors", safetensors.torch.save(state))
            outcome = bench.command("evaluate", file, "--arch", ARCH, "--test-dir", bench.clean, "--json")
            rates.append(json.loads(outcome.text)["evaluation"])
        assert rates[0] == rates[1]
        return outcome

    return run


def half_prefixed(bench: Bench) -> Outcome:
    state = bench.state()
    state["module.fc.bias"] = state.pop("fc.bias")
    return bench.sanitize(bench.put("m.safetensors", safetensors.torch.save(state)))


def more_classes(bench: Bench) -> Outcome:
    """What the message says to type makes the run go on."""
    state = bench.state()
    state["fc.weight"], state["fc.bias"] = torch.ones(7, *state["fc.weight"].shape[1:]), torch.ones(7)
    file = bench.put("m.safetensors", safetensors.torch.save(state))
    outcome = bench.sanitize(file)
    assert outcome.error is not None and str(outcome.error.hint).endswith(": --num-classes 7")
    assert bench.command("scan", file, "--arch", ARCH, "--num-classes", 7).code == 0
    return outcome


def other_network(bench: Bench) -> Outcome:
    """The same for a file of another, usual network: the message names it."""
    torch.manual_seed(0)
    state = timm.create_model("mobilenetv3_small_050", num_classes=3).state_dict()
    file = bench.put("m.safetensors", safetensors.torch.save(state))
    outcome = bench.sanitize(file)
    assert outcome.error is not None
    fit = "--arch timm/mobilenetv3_small_050 --num-classes 3"
    assert str(outcome.error.hint).endswith(f": {fit}")
    assert bench.command("scan", file, *fit.split()).code == 0
    return outcome


def no_usual_network(bench: Bench) -> Outcome:
    file = bench.put("m.safetensors", safetensors.torch.save(bench.state()))
    return bench.command("sanitize", file, "--arch", "timm/resnet18?num_classes=3", "--clean-dir", bench.clean)


def huge_network(bench: Bench) -> Outcome:
    config = json.loads((bench.model / "config.json").read_text())
    (bench.model / "config.json").write_text(json.dumps({**config, "model_args": {"channels": [3_000] * 4}}))
    return bench.sanitize()


def wrong_extension(bench: Bench) -> Outcome:
    torch.save(bench.state(), bench.bad / "m.safetensors")
    return bench.command("evaluate", bench.bad / "m.safetensors", "--arch", ARCH, "--test-dir", bench.clean)


def safetensors_called_pth(bench: Bench) -> Outcome:
    file = bench.put("m.pth", safetensors.torch.save(bench.state()))
    return bench.command("evaluate", file, "--arch", ARCH, "--test-dir", bench.clean)


def html(bench: Bench) -> bytes:
    return b"<!DOCTYPE html><html>404</html>"


REFUSED = CheckpointError
CASES = [
    Case(1, "pickle payload in a zip", payload, REFUSED, "system, which weights never need", 2),
    Case(1, "pickle payload in the old format", lambda b: payload(b, False), REFUSED, "nothing was run", 2),
    Case(2, "whole pickled module", converted(lambda b: nn.Linear(2, 2)), REFUSED, "a whole pickled model", 2),
    Case(2, "Namespace", converted(lambda b: {"args": argparse.Namespace(lr=1)}), REFUSED, "argparse.Namespace", 2),
    Case(2, "numpy scalar", converted(lambda b: {"best": np.float64(0.9)}), REFUSED, "multiarray.scalar", 2),
    Case(3, "TorchScript", torchscript, REFUSED, "a TorchScript archive, which is a program", 2),
    Case(4, "legacy tar", given(tar), REFUSED, "a tar archive", 2),
    Case(5, "zero bytes", given(lambda b: b""), REFUSED, "the file is empty", 2),
    Case(6, "truncated zip", given(lambda b: bytes(zipped(b.state())[:-999])), REFUSED, "truncated or damaged", 2),
    Case(7, "bit flip in a zip", given(bit_flip), REFUSED, "the checksum of", 2, silent=True),
    Case(7, "bit flip in an artifact", bit_flip_in_an_artifact, REFUSED, f"not the file that {MANIFEST}", 2,
         silent=True),
    Case(7, "bit flip in the cache", bit_flip_in_the_cache, ModelReferenceError, "is damaged: its sha256", 2,
         silent=True),
    Case(8, "stride-0 tensor", saved(stride_0), REFUSED, "claims 4000000000000 bytes of a 4-byte storage", 2,
         silent=True),
    Case(9, "deflated bomb", given(bomb), REFUSED, "bytes of zip unpack to", 2),
    Case(10, "sparse tensor", converted(lambda b: {"w": torch.eye(3).to_sparse()}), REFUSED, "'w' is sparse", 2),
    Case(10, "complex tensor", converted(lambda b: {"w": torch.ones(3) * 1j}), REFUSED, "'w' is complex", 2),
    Case(10, "meta tensor", converted(lambda b: {"w": torch.ones(3, device="meta")}), REFUSED, "without data (meta)",
         2),
    Case(11, "NaN", changed("layer1.0.conv1.weight", one_bad_value(float("nan"))), REFUSED,
         "'layer1.0.conv1.weight' holds NaN or Inf in 1 of", 2, silent=True),
    Case(11, "infinity", changed("fc.bias", one_bad_value(float("inf"))), REFUSED, "'fc.bias' holds NaN or Inf", 2,
         silent=True),
    Case(12, "negative running_var", changed("conv1.1.running_var", one_bad_value(-0.5)), REFUSED,
         "'conv1.1.running_var' is a variance and is negative: -0.5", 2, silent=True),
    Case(13, "list", converted(lambda b: [torch.ones(1)]), REFUSED, "holds a list, not a state dict", 2),
    Case(13, "integer keys", converted(lambda b: {0: torch.ones(1)}), REFUSED, "has the key 0", 2),
    Case(14, "module. on every key", prefixed("module."), says='"accuracy"', silent=True),
    Case(14, "_orig_mod. and model.", prefixed("_orig_mod.model."), says='"accuracy"', silent=True),
    Case(14, "a prefix on one key", half_prefixed, REFUSED, "1 missing (fc.bias), 1 unexpected (module.fc.bias)", 2,
         silent=True),
    Case(15, "another number of classes", more_classes, REFUSED, "is [7, 96] in the checkpoint and [3, 96] in the", 2),
    Case(15, "another network", other_network, REFUSED, "its tensors are not those of the model", 2),
    Case(15, "a network of nobody's list", no_usual_network, REFUSED, "missing (", 2),
    Case(15, "a config that asks for gigabytes", huge_network, ModelReferenceError, "more than 256 MiB of weights", 2),
    Case(16, "int64 weights", changed("fc.weight", lambda t: t.long()), REFUSED, "'fc.weight' holds int64", 2,
         silent=True),
    Case(17, "zip called .safetensors", wrong_extension, says="accuracy %"),
    Case(17, "safetensors called .pth", safetensors_called_pth, says="accuracy %"),
    Case(17, "a web page called .pth", given(html), REFUSED, "a web page, not a checkpoint", 2),
]  # fmt: skip
