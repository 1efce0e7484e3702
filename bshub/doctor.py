"""Looks at the place where bshub shall run: packages, processors, ONNX, folders, the Hub. Changes nothing.

A check is one function that returns findings, and one line in ``CHECKS``. Only what every run needs can fail; what is
merely absent (a GPU, a login, an extra) is a note.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bshub import __version__
from bshub.errors import printable, redacted
from bshub.intake.hub import HubFault, diagnose

OK, NOTE, UNKNOWN, FAILED = "ok", "note", "unknown", "failed"
HUB_SECONDS = 5.0  # for a connection and for an answer
_HUB_PATIENCE = 3 * HUB_SECONDS  # a name server that is silent obeys no timeout of ours
_ROOM = 1 << 30
_LOOKED_AT = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "safetensors", "huggingface-hub", "pillow")


@dataclass(frozen=True)
class Observation:
    """One thing that was looked at.

    Attributes:
        name: What, a word or two.
        state: ``ok``, ``note`` (absent, and nothing needs it), ``unknown`` (could not be asked) or ``failed``.
        text: What was seen.
        hint: What to type or change; empty where nothing is to be done.
    """

    name: str
    state: str
    text: str
    hint: str = ""


@dataclass(frozen=True)
class Examination:
    """What the doctor saw.

    Attributes:
        observations: In the order of the checks.
    """

    observations: tuple[Observation, ...]

    @property
    def code(self) -> int:
        """Exit code: 1 something that a run needs is broken, 3 the Hub could not be asked, else 0."""
        states = {seen.state for seen in self.observations}
        return 1 if FAILED in states else 3 if UNKNOWN in states else 0

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        verdict = {0: "pass", 1: "fail", 3: "inconclusive"}[self.code]
        return {"verdict": verdict, "checks": [asdict(seen) for seen in self.observations]}


def examine() -> Examination:
    """Run every check.

    The Hub is asked one question, with a login where there is one, for at most five seconds to connect and five to
    answer; not at all under ``HF_HUB_OFFLINE``. No text holds a token.

    Returns:
        The observations.
    """
    seen = []
    for name, check in CHECKS.items():
        try:
            seen += list(check())
        except Exception as error:  # a broken installation raises anything; the other checks still matter
            what = f"{type(error).__name__}: {error}"
            seen.append(Observation(name, FAILED, what, "install bshub again, in an environment of its own"))
    return Examination(
        tuple(Observation(it.name, it.state, printable(redacted(it.text)), printable(it.hint)) for it in seen)
    )


def _packages() -> Iterator[Observation]:
    yield Observation(
        "bshub", OK, f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}"
    )
    wrong = list(_unmet(extra=""))
    versions = {name: _version(name) or _version(f"{name}-gpu") for name in _LOOKED_AT}
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    if wrong:
        yield Observation("packages", FAILED, f"{'; '.join(wrong)} ({text})", "pip install --upgrade bshub")
    else:
        yield Observation("packages", OK, text)


def _unmet(extra: str) -> Iterator[str]:
    """Requirements of bshub that do not hold here: those without an extra, or those that one adds."""
    from packaging.requirements import Requirement

    for line in metadata.requires("bshub") or ():
        wanted = Requirement(line)
        marker = wanted.marker
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        if extra and (marker is None or marker.evaluate({"extra": ""})):
            continue
        found = _version(wanted.name)
        if found is None:
            yield f"{wanted.name} is not installed"
        elif not wanted.specifier.contains(found, prereleases=True):
            yield f"{wanted.name} {found} is not {wanted.specifier}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> Iterator[Observation]:
    for extra in sorted(set(metadata.metadata("bshub").get_all("Provides-Extra") or ()) - {"dev", "docs"}):
        missing = list(_unmet(extra))
        name, get = f"extra {extra}", f"pip install 'bshub[{extra}]'"
        yield Observation(name, NOTE, "; ".join(missing), get) if missing else Observation(name, OK, "installed")


def _processors() -> Iterator[Observation]:
    import torch
    from torchvision import extension

    yield Observation("cpu", OK, f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} of them")
    if not extension._has_ops():  # type: ignore[no-untyped-call]
        yield Observation(
            "torchvision", FAILED, "its compiled part does not load beside this torch", "reinstall both together"
        )
    if not torch.cuda.is_available():
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for the CPU"
        yield Observation("cuda", NOTE, f"no device ({build}); everything runs on the CPU as well")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        torch.ones(2, device=f"cuda:{index}").sum().item()
        yield Observation(f"cuda:{index}", OK, f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        yield Observation("mps", NOTE, "not used: it lacks the double precision that the proof needs")


def _onnx() -> Iterator[Observation]:
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"x": np.ones(1, np.float32)})
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    state = OK if float(answer[0]) == -1.0 else FAILED
    yield Observation("onnxruntime", state, f"providers: {providers}; bshub itself compares on CPU")


def _folders() -> Iterator[Observation]:
    from huggingface_hub import constants

    cache, temporary = Path(constants.HF_HUB_CACHE), Path(tempfile.gettempdir())
    for name, folder, change in (("cache", cache, "HF_HUB_CACHE"), ("temporary", temporary, "TMPDIR")):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free
        text = f"{folder}, {free / 2**30:.1f} GiB free" + ("" if there == folder else ", made when needed")
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield Observation(name, FAILED, f"{folder} cannot be written", f"set {change} to a folder of yours")
        elif free < _ROOM:
            yield Observation(name, NOTE, text, f"free some space, or set {change}")
        else:
            yield Observation(name, OK, text)


def _walls() -> Iterator[Observation]:
    """How tightly the child process that opens pickles can be shut in; tried in a child, for it cannot be undone."""
    code = "import sys, pathlib; from bshub.intake import confine; print(*confine.forbid_natively(pathlib.Path({!r})))"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code.format(folder)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    walls = child.stdout.split() if child.returncode == 0 else []
    if walls:
        yield Observation("confinement", OK, f"pickles are opened in a child under {' and '.join(walls)}")
    else:
        text = "pickles are opened in a child with limits of its own; this system adds no landlock or seccomp"
        yield Observation("confinement", NOTE, text, "prefer .safetensors, which needs no child")


def _hub() -> Iterator[Observation]:
    from huggingface_hub import constants, get_token

    token = get_token()
    answer: list[tuple[int, str] | HubFault] = []

    def ask() -> None:
        try:
            answer.append(_who(token))
        except Exception as error:  # the client's own, its HTTP library's and the standard library's errors
            answer.append(diagnose(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_PATIENCE)
    stored = "a token is stored; whether it works is not known" if token else "not logged in"
    look = "look at the network and the proxy, or set HF_HUB_OFFLINE=1 to work without the Hub"
    got = answer[0] if answer else None
    if got is None:
        yield Observation("hub", UNKNOWN, f"no answer from {constants.ENDPOINT} within {_HUB_PATIENCE:.0f} s", look)
    elif not isinstance(got, tuple):
        state = NOTE if got.offline else UNKNOWN
        yield Observation("hub", state, got.cause, "" if got.offline else look)
    elif got[0] not in (200, 401, 403):
        yield Observation("hub", UNKNOWN, f"{constants.ENDPOINT} answered {got[0]}", "try again later")
    else:
        yield Observation("hub", OK, f"{constants.ENDPOINT} answers")
        stored = f"logged in as {got[1]}" if got[0] == 200 and token else stored
        if token and got[0] != 200:
            text = f"the Hub refuses the stored token ({got[0]}), and with it even public downloads"
            yield Observation("login", FAILED, text, "run `hf auth login`, or unset HF_TOKEN")
            return
    hint = "" if token else "only publishing and private models need `hf auth login`"
    yield Observation("login", OK if stored.startswith("logged") else NOTE, stored, hint)


def _who(token: str | None) -> tuple[int, str]:
    """Status of the Hub's answer to "who am I", and the account's name.

    Raises:
        ValueError: What answered is not the Hub.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers

    response = get_session().get(
        f"{constants.ENDPOINT}/api/whoami-v2", headers=build_hf_headers(token=token or False), timeout=HUB_SECONDS
    )
    body = response.json() if response.status_code == 200 else {}
    role = ((body.get("auth") or {}).get("accessToken") or {}).get("role")
    return response.status_code, f"{body.get('name', '?')}" + (f", token may {role}" if role else "")


CHECKS: dict[str, Callable[[], Iterator[Observation]]] = {
    "packages": _packages,
    "processors": _processors,
    "onnxruntime": _onnx,
    "folders": _folders,
    "confinement": _walls,
    "hub": _hub,
    "extras": _extras,
}
