"""What does not ship: a real, signed artifact, every harm to it, and the real command that refuses it with its reason.

The keys are openssl's, the signature is made by ``bshub sanitize --sign``, and each row is a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, bshub_command
from little_onnx import linear_onnx
from sarif_schema import check_sarif

from bshub.files import MANIFEST
from bshub.release.artifact import write_json, write_report
from bshub.release.bom import BOM
from bshub.release.policy import read_policy
from bshub.release.receipt import SIGNATURE
from bshub.release.signature import sign_receipt

pytest.importorskip("model_signing")
pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")

# Without these two, root is refused by the rights of a file as everybody is.
_POWERLESS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@dataclass(frozen=True)
class Shipped:
    """A folder with ``artifact``, ``policy.toml`` that names the signer, and the keys."""

    place: Path

    @property
    def artifact(self) -> Path:
        """The artifact in it."""
        return self.place / "artifact"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, few_test_images: Path) -> Path:
    """The demo, sanitized and signed, as the documentation says it."""
    place = tmp_path_factory.mktemp("shipped")
    for name in ("key", "stranger"):
        run(place, "openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.pem")
        run(place, "openssl", "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub.pem")
    made = bshub_command(
        "sanitize", DEMO / "model", "--clean-dir", DEMO / "clean", "--test-dir", few_test_images, "--no-report",
        "--score", "lipschitz", "--finetune-epochs", 0, "--sign", place / "key.pem", "-o", place / "artifact",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    policy(place, signer="key.pub.pem")
    return place


@pytest.fixture
def shipped(original: Path, tmp_path: Path) -> Shipped:
    """A copy that may be harmed."""
    shutil.copytree(original, tmp_path / "copy")
    return Shipped(tmp_path / "copy")


def run(folder: Path, *command: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A process that ends within a minute; a gate that waits for a pipe would not."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def policy(place: Path, **asked: Any) -> None:
    """The default policy with other values for some keys."""
    kept = {key: value for key, value in read_policy(None).as_dict()["asks"].items() if value is not None} | asked
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in kept.items())
    (place / "policy.toml").write_text(text, encoding="utf-8")


def gate(shipped: Shipped, environment: dict[str, str], *words: object, powerless: bool = False) -> Any:
    """The command as a hook types it."""
    code = "import sys; from bshub_cli.start import main; sys.argv[0] = 'bshub'; main()"
    command = [*(_POWERLESS if powerless else []), sys.executable, "-c", code, "gate"]
    return run(shipped.place, *command, *(words or ("artifact", "--policy", "policy.toml")), environment=environment)


def forge(shipped: Shipped, sign: bool = False, **changes: Any) -> None:
    """Another receipt over what the folder holds now; with the signer's key where ``sign``."""
    signature = (shipped.artifact / SIGNATURE).read_bytes()
    record = json.loads((shipped.artifact / MANIFEST).read_text(encoding="utf-8"))
    (shipped.artifact / SIGNATURE).unlink()
    write_report(shipped.artifact, {**record, **changes})
    if "created" in changes:
        written = json.loads((shipped.artifact / MANIFEST).read_text(encoding="utf-8"))
        write_json(shipped.artifact / MANIFEST, {**written, "created": changes["created"]})
    (shipped.artifact / SIGNATURE).write_bytes(signature)
    if sign:
        sign_receipt(shipped.artifact, shipped.place / "key.pem")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def flip_and_forge(shipped: Shipped) -> None:
    flip(shipped.artifact / "model.safetensors")
    forge(shipped)


def edit_card(shipped: Shipped) -> None:
    card = shipped.artifact / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("no proof", "proof"), encoding="utf-8")


def in_its_place(name: str, put: Callable[[Path], Any]) -> Callable[[Shipped], None]:
    def harm(shipped: Shipped) -> None:
        (shipped.artifact / name).unlink()
        put(shipped.artifact / name)

    return harm


def locked(name: str) -> Callable[[Shipped], None]:
    return lambda shipped: (shipped.place / name).chmod(0)


def other_signature(shipped: Shipped) -> None:
    (shipped.artifact / SIGNATURE).unlink()
    sign_receipt(shipped.artifact, shipped.place / "stranger.pem")


ROWS: dict[str, tuple[Callable[[Shipped], Any], str, str]] = {
    # what was done → the harm, the rule, what is said of it
    "tampered weight": (lambda s: flip(s.artifact / "model.safetensors"), "file-changed", "model.safetensors was chan"),
    "tampered weight, receipt rewritten": (flip_and_forge, "signature", "signs another receipt"),
    "truncated weights": (lambda s: os.truncate(s.artifact / "model.safetensors", 99), "file-changed", "was changed"),
    "swapped ONNX": (lambda s: linear_onnx(s.artifact / "model.onnx"), "file-changed", "model.onnx was changed"),
    "edited card": (edit_card, "file-changed", "README.md was changed"),
    "edited bill": (lambda s: flip(s.artifact / BOM), "file-changed", f"{BOM} was changed"),
    "better rates in the receipt": (lambda s: forge(s, evaluation=None), "signature", "signs another receipt"),
    "expired": (lambda s: forge(s, sign=True, created="2020-01-01T00:00:00+00:00"), "age", "expired: written"),
    "from the future": (lambda s: forge(s, sign=True, created="2999-01-01T00:00:00+00:00"), "age", "in the future"),
    "unsigned": (lambda s: (s.artifact / SIGNATURE).unlink(), "signature", "the receipt is not signed"),
    "signed by a stranger": (other_signature, "signature", "another key made it"),
    "broken signature": (lambda s: (s.artifact / SIGNATURE).write_text("{}"), "signature", "does not hold"),
    "another signer asked": (lambda s: policy(s.place, signer="stranger.pub.pem"), "signature", "does not hold"),
    "stricter policy": (lambda s: policy(s.place, signer="key.pub.pem", min_accuracy=99.9), "accuracy", "at least 99"),
    "licence not allowed": (lambda s: policy(s.place, licences=["mit"]), "licence", "is not one of mit"),
    "method not accepted": (lambda s: policy(s.place, methods=["paper"]), "method", "the policy accepts paper"),
    "older than asked": (lambda s: policy(s.place, min_bshub="99"), "version", "asks 99 or newer"),
    "file asked and not there": (lambda s: policy(s.place, required_files=["report.html"]), "file-required", "report"),
    "missing weights": (lambda s: (s.artifact / "model.safetensors").unlink(), "file-missing", "listed in the receipt"),
    "missing bill": (lambda s: (s.artifact / BOM).unlink(), "file-missing", BOM),
    "missing receipt": (lambda s: (s.artifact / MANIFEST).unlink(), "receipt-missing", "not sanitized by bshub"),
    "file added": (lambda s: (s.artifact / "pytorch_model.bin").write_bytes(b"x"), "file-surplus", "does not list it"),
    "locked weights": (locked("artifact/model.safetensors"), "file-unreadable", "Permission denied"),
    "locked receipt": (locked(f"artifact/{MANIFEST}"), "receipt-unreadable", "Permission denied"),
    "locked signature": (locked(f"artifact/{SIGNATURE}"), "signature", "Permission denied"),
    "folder for a file": (in_its_place("config.json", Path.mkdir), "file-unreadable", "no regular file"),
    "pipe for a file": (in_its_place("config.json", os.mkfifo), "file-unreadable", "no regular file"),
    "pipe for the receipt": (in_its_place(MANIFEST, os.mkfifo), "receipt-unreadable", "no file of at most"),
    "pipe for the signature": (in_its_place(SIGNATURE, os.mkfifo), "signature", "no plain file"),
    "link for a file": (in_its_place("config.json", lambda p: p.symlink_to(os.devnull)), "file-link", "symbolic link"),
    "receipt that is no JSON": (lambda s: (s.artifact / MANIFEST).write_bytes(b"\xff"), "receipt-unreadable", "not a"),
}  # fmt: skip


def test_an_untouched_artifact_passes_and_model_signing_agrees(
    original: Path, child_environment: dict[str, str]
) -> None:
    done = gate(Shipped(original), child_environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "signed by" in done.stdout and "pass: artifact" in done.stdout
    signing = [sys.executable, "-m", "model_signing", "verify", "key", f"artifact/{MANIFEST}"]
    told = ["--signature", f"artifact/{SIGNATURE}", "--public_key"]
    assert run(original, *signing, *told, "key.pub.pem", environment=child_environment).returncode == 0
    assert run(original, *signing, *told, "stranger.pub.pem", environment=child_environment).returncode != 0


@pytest.mark.parametrize("row", ROWS)
def test_each_harm_is_refused_with_its_reason(shipped: Shipped, child_environment: dict[str, str], row: str) -> None:
    harm, rule, said = ROWS[row]
    if row.startswith("locked") and _POWERLESS and not shutil.which(_POWERLESS[0]):
        pytest.skip("root reads everything here, and there is no setpriv")
    harm(shipped)
    words = ("artifact", "--policy", "policy.toml", "--sarif", "x.sarif")
    done = gate(shipped, child_environment, *words, powerless=row.startswith("locked"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    shown = " ".join(done.stdout.split())
    assert f"REFUSED {rule} " in shown and said in shown
    assert shown.endswith("refused: artifact")
    log = json.loads((shipped.place / "x.sarif").read_text(encoding="utf-8"))
    check_sarif(log)
    errors = [item for item in log["runs"][0]["results"] if item["level"] == "error"]
    assert rule in {item["ruleId"] for item in errors}
    assert all(" Next: " in item["message"]["text"] for item in errors)


@pytest.mark.parametrize(
    ("harm", "words", "code", "said"),
    [
        (lambda s: None, ("artifact", "--policy-sha256", "0" * 64), 1, "policy-changed"),
        (lambda s: None, ("timm/resnet18",), 1, "library's model without a receipt"),
        (lambda s: shutil.move(s.artifact / "model.onnx", s.place), ("model.onnx",), 1, "lone ONNX file"),
        (lambda s: (s.artifact / MANIFEST).unlink(), ("artifact/model.onnx",), 1, "lone ONNX file"),
        (lambda s: linear_onnx(s.artifact / "model.onnx"), ("artifact/model.onnx",), 1, "model.onnx was changed"),
        (lambda s: policy(s.place, min_images=1000), ("artifact", "--policy", "policy.toml"), 3, "fewer than 1000"),
        (lambda s: policy(s.place, require_asr=True), ("artifact", "--policy", "policy.toml"), 3, "not measured"),
        (lambda s: policy(s.place, signer="sha256:" + "0" * 64), ("artifact", "--policy", "policy.toml"), 3, "--key"),
        (lambda s: shutil.rmtree(s.artifact), ("artifact",), 2, "there is no file or folder artifact"),
        (lambda s: None, ("user/repo",), 2, "hf download user/repo --local-dir FOLDER"),
        (lambda s: None, ("artifact", "--policy", "none.toml"), 2, "No such file"),
        (lambda s: policy(s.place, min_acuracy=1), ("artifact", "--policy", "policy.toml"), 2, "did you mean min_"),
        (locked("policy.toml"), ("artifact", "--policy", "policy.toml"), 2, "Permission denied"),
        (locked("key.pub.pem"), ("artifact", "--policy", "policy.toml"), 2, "Permission denied"),
        (locked("artifact"), ("artifact",), 1, "Permission denied"),
        (lambda s: None, ("artifact", "--key", "policy.toml"), 2, "not a public key"),
    ],
)  # fmt: skip
def test_what_cannot_be_examined_has_its_own_code_and_never_passes(
    shipped: Shipped,
    child_environment: dict[str, str],
    harm: Callable[[Shipped], Any],
    words: Any,
    code: int,
    said: str,
) -> None:
    powerless = "Permission" in said
    if powerless and _POWERLESS and not shutil.which(_POWERLESS[0]):
        pytest.skip("root reads everything here, and there is no setpriv")
    harm(shipped)
    done = gate(shipped, child_environment, *words, powerless=powerless)
    shipped.artifact.exists() and shipped.artifact.chmod(0o755)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr
