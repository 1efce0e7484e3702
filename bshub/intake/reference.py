"""What a user types for a model → :class:`Reference`.

    timm/resnet18              an architecture of timm with its default weights
    timm/resnet18.a1_in1k      … with those weights
    torchvision/resnet50       an architecture of torchvision with its default weights
    torchvision/resnet50:IMAGENET1K_V1
    user/repo[@revision]       a repository on the Hub, in timm's layout or a bshub artifact
    ./folder                   the same layout on disk
    ./file.safetensors         weights alone; the architecture is given with ``--arch``

Options follow an architecture after ``?``, joined by ``&``: ``timm/resnet18?num_classes=10&stem=cifar``.

* ``stem=cifar``: the first convolution becomes 3x3 with stride 1 and the first max pooling goes (the usual
  CIFAR stem, which timm's config cannot express).
* ``input_size=32``, ``mean=0.49,0.48,0.44``, ``std=…``: the preprocessing, where it is not the library's own.
* everything else goes to the library's constructor: ``channels=32,64,128,256``, ``drop_rate=0.1``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bshub.errors import ModelReferenceError

# What a constructor must not be told by a reference or by somebody's config.json.
FORBIDDEN_ARGUMENTS = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights", "progress"}
    | {"weights_backbone", "features_only", "scriptable", "exportable", "no_jit"}
)


LIBRARIES = ("timm", "torchvision")


@dataclass(frozen=True)
class Architecture:
    """A constructor and its arguments.

    Attributes:
        library: ``timm`` or ``torchvision``.
        name: The library's name of the network.
        tag: Name of pretrained weights, or None.
        arguments: Keyword arguments of the constructor.
        stem: ``cifar`` or None.
        preprocessing: ``input_size``, ``mean``, ``std`` where given.
    """

    library: str
    name: str
    tag: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    stem: str | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """Where the weights are: an architecture's own, a Hub repository or a path."""

    text: str
    architecture: Architecture | None = None
    repository: str | None = None
    path: Path | None = None


def parse_reference(text: str) -> Reference:
    """Read a model reference.

    Args:
        text: As typed.

    Returns:
        The reference; a path in it exists.

    Raises:
        ModelReferenceError: It is none of the known forms, or the path does not exist.
    """
    if not text or "\0" in text:
        raise ModelReferenceError(
            "the model reference is empty or has a zero byte",
            hint="bshub scan timm/resnet18, user/repo, ./folder or ./file",
        )
    plain = text.removeprefix("hf-hub:").removeprefix("local-dir:")
    explicit, text = plain != text, plain
    library = text.partition("/")[0]
    try:
        path = Path(text).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelReferenceError(f"{text!r} cannot be a path: {error}", hint="check the path") from None
    if library in LIBRARIES and not exists:
        return Reference(text, architecture=parse_architecture(text))
    if exists:
        return Reference(text, path=path)
    if text.startswith((".", "/", "~")) or path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".onnx"):
        near = _beside(path)
        raise ModelReferenceError(f"no file or folder at {text}", hint=near or "check the path")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text):
        if not explicit and difflib.get_close_matches(library, LIBRARIES, n=1, cutoff=0.8) and (near := _suggest(text)):
            raise ModelReferenceError(
                f"{text!r} is almost a network of a library",
                hint=f"did you mean {near}? A repository of that name on the Hub is hf-hub:{text}",
            )
        return Reference(text, repository=text)
    if near := _beside(path):
        raise ModelReferenceError(f"no file or folder at {text}", hint=near)
    near = _suggest(text)
    raise ModelReferenceError(
        f"{text!r} is neither a path nor a model reference",
        hint=f"did you mean {near}?" if near else "timm/NAME, torchvision/NAME, user/repo, ./folder or ./file",
    )


def parse_architecture(text: str) -> Architecture:
    """Read ``timm/NAME[.TAG][?options]`` or ``torchvision/NAME[:WEIGHTS][?options]``.

    Raises:
        ModelReferenceError: Unknown library, network or option.
    """
    head, _, query = text.partition("?")
    library, _, name = head.partition("/")
    if library not in LIBRARIES or not name:
        raise ModelReferenceError(f"{text!r} is not an architecture", hint="write timm/NAME or torchvision/NAME")
    name, _, tag = name.partition("." if library == "timm" else ":")
    options = dict(parse_option(part) for part in query.split("&") if part)
    stem = options.pop("stem", None)
    if stem not in (None, "cifar"):
        raise ModelReferenceError(f"unknown stem {stem!r}", hint="the only other stem is stem=cifar")
    preprocessing: dict[str, Any] = {
        str(key): options.pop(key) for key in ("input_size", "mean", "std") if key in options
    }
    bad = FORBIDDEN_ARGUMENTS & options.keys()
    if bad:
        raise ModelReferenceError(
            f"{sorted(bad)[0]!r} cannot be set in a model reference",
            hint="leave it away: what loads weights is no option of a reference",
        )
    return Architecture(library, name, tag or None, options, stem, preprocessing)


def parse_option(part: str) -> tuple[str, Any]:
    """``name=value`` with the value as a number, truth value, list or text.

    Raises:
        ModelReferenceError: It is not of that form.
    """
    key, equals, value = part.partition("=")
    if not equals or not key.isidentifier():
        raise ModelReferenceError(f"{part!r} is not an option", hint="options are name=value, joined by &")
    return key, _literal(value)


def _literal(value: str) -> Any:
    if "," in value:
        return [_literal(item) for item in value.split(",") if item]
    if value in ("True", "true", "False", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _suggest(text: str) -> str | None:
    """The nearest network of a library."""
    import timm
    from torchvision import models

    owner, _, name = (text if "/" in text else f"timm/{text}").partition("/")
    known = {"timm": timm.list_models(), "torchvision": models.list_models(module=models)}
    first = difflib.get_close_matches(owner, LIBRARIES, n=1, cutoff=0.8) or ["timm"]
    for library in sorted(known, key=lambda library: library not in first):
        if near := difflib.get_close_matches(re.split(r"[?.:]", name)[0].casefold(), known[library], n=1, cutoff=0.7):
            return f"{library}/{near[0]}"
    return None


def _beside(path: Path) -> str | None:
    """The nearest name in the folder where a path leads nowhere, as a question."""
    try:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent != Path() else []
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"did you mean {path.parent / near[0]}?" if near else None
