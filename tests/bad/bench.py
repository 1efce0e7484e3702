"""The bench on which a case is run: a small model, clean images and an earlier output that nothing may touch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from conftest import bshub_command
from loopback_hub import LoopbackHub, point_client_at
from nets import randomize_batch_norm
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from bshub.errors import BshubError
from bshub.files import MANIFEST

CLASSES = ("bird", "cat", "dog")
ARCH = "timm/test_resnet?num_classes=3&input_size=32"
QUICK = ("--no-onnx", "--no-report", "--mu", 2, "--finetune-epochs", 1)
TOKEN = "hf_canaryCANARYcanaryCANARYcanary"


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        error: The error, as the library raised it.
        code: Exit code; of a library call, the one that the command would end with.
        text: Everything that was printed, or the result as text.
    """

    error: BshubError | None
    code: int
    text: str


@dataclass(frozen=True)
class Case:
    """One line of the list.

    Attributes:
        number: As in the list.
        what: The bad thing.
        run: Builds it and sends it through the door; checks what the outcome alone cannot show.
        error: Class of the error; None where the run goes on.
        says: Part of the message, or of what is printed.
        code: Exit code.
        silent: Libraries accept it and say nothing.
    """

    number: int
    what: str
    run: Callable[[Bench], Outcome]
    error: type[BshubError] | None = None
    says: str = ""
    code: int = 0
    silent: bool = False

    @property
    def id(self) -> str:
        """The test's id: ``07-bit flip in the zip``."""
        return f"{self.number:02}-{self.what}"


class Bench:
    """Folders of one case below ``root``.

    Attributes:
        root: Everything.
        bad: Where a case puts what it builds.
        out: An earlier output.
        clean: Three classes with three images each.
        model: A model folder.
        weights: The model's weights.
        monkeypatch: Of the test.
    """

    def __init__(self, root: Path, monkeypatch: Any) -> None:
        self.root, self.monkeypatch = root, monkeypatch
        self.bad, self.out = root / "bad", root / "outputs" / "out"
        self.bad.mkdir(parents=True)
        self.clean, self.model = make_images(root / "clean"), make_model(root / "model")
        self.weights = self.model / "model.safetensors"
        self.out.mkdir(parents=True)
        (self.out / "model.safetensors").write_bytes(b"an earlier model")
        (self.out / MANIFEST).write_text("{}")
        self.before = contents(root / "outputs")
        self._hub: LoopbackHub | None = None
        point_client_at("http://127.0.0.1:9", monkeypatch, root / "cache")  # nobody is asked by mistake

    def state(self) -> dict[str, Tensor]:
        """A sound state dict of the model."""
        return {name: tensor.clone() for name, tensor in weights().items()}

    def put(self, name: str, data: bytes | str) -> Path:
        """Write a file among the bad things."""
        path = self.bad / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    def sanitize(self, model: object = None, *more: object, clean: object = None, output: object = None) -> Outcome:
        """``bshub sanitize`` over the earlier output; ``model`` may be a file of weights."""
        model = self.model if model is None else model
        arch = ["--arch", ARCH] if isinstance(model, Path) and model.suffix else []
        return self.command(
            "sanitize", model, *arch, "--clean-dir", clean or self.clean, "-o", output or self.out, "--overwrite",
            *QUICK, *more,
        )  # fmt: skip

    def command(self, *arguments: object) -> Outcome:
        """The command line, in this process."""
        result = bshub_command(*arguments)
        error: BaseException | None = result.exception
        while error is not None and not isinstance(error, BshubError):
            error = error.__context__
        if result.exit_code and error is not None and "--debug" not in arguments:
            lines = result.stderr.splitlines()
            assert lines[0].startswith("bshub: "), result.stderr
            assert all(line.startswith("       ") for line in lines[1:]), result.stderr
        return Outcome(error, result.exit_code, result.output)

    def call(self, function: Callable[..., object], *arguments: Any, **more: Any) -> Outcome:
        """A function of the library."""
        try:
            return Outcome(None, 0, str(function(*arguments, **more)))
        except BshubError as error:
            return Outcome(error, error.exit_code, str(error))

    @property
    def hub(self) -> LoopbackHub:
        """A Hub on the loopback, started at first use, that a token is sent to."""
        from bshub.intake import hub as intake
        from bshub.release import publish

        if self._hub is None:
            self._hub = LoopbackHub().__enter__()
            point_client_at(self._hub.url, self.monkeypatch, self.root / "cache")
            self.monkeypatch.setenv("HF_TOKEN", TOKEN)
            self.monkeypatch.setattr(intake, "WAITS", (0.01, 0.01))
            self.monkeypatch.setattr(publish, "_WAITS", (0.01, 0.01))
        return self._hub

    def close(self) -> None:
        """Stop the Hub."""
        if self._hub is not None:
            self._hub.__exit__()


@cache
def weights() -> dict[str, Tensor]:
    """The weights of the small network."""
    torch.manual_seed(0)
    return randomize_batch_norm(timm.create_model("test_resnet", num_classes=3)).state_dict()


def make_model(folder: Path, labels: tuple[str, ...] = CLASSES) -> Path:
    """The network in timm's layout."""
    folder.mkdir()
    save_file(weights(), folder / "model.safetensors")
    pretrained = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": pretrained, "label_names": labels}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_images(folder: Path, names: tuple[str, ...] = CLASSES, each: int = 3) -> Path:
    """Coloured squares, one folder per class."""
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for k in range(each):
            Image.new("RGB", (36, 32), (60 * place, 80 * k, 90)).save(folder / name / f"{k}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden files too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def open_bench(root: Path, monkeypatch: Any) -> Iterator[Bench]:
    """A bench that is closed and cleared afterwards."""
    bench = Bench(root, monkeypatch)
    try:
        yield bench
    finally:
        bench.close()
        shutil.rmtree(root, ignore_errors=True)
