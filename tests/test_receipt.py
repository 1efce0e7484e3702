"""The receipt: every way in which a folder is not the one that was written, and the signature over it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, bshub_command

from bshub.errors import UsageError
from bshub.files import MANIFEST
from bshub.release.artifact import write_json, write_report
from bshub.release.receipt import SIGNATURE, read_receipt

FILES = ("model.safetensors", "config.json", "README.md", "dense/config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A little artifact whose receipt holds."""
    place = tmp_path / "artifact"
    (place / "dense").mkdir(parents=True)
    for name in FILES:
        (place / name).write_text(f"content of {name}")
    write_report(place, {"settings": {"method": "bshub"}, "counts": {}})
    return place


def refusals(folder: Path) -> list[tuple[str, str | None]]:
    """Rule and path of each refusal."""
    return [(item.rule, item.path) for item in read_receipt(folder).findings if item.level != "pass"]


def test_an_untouched_folder_holds_and_says_when_it_was_written(folder: Path) -> None:
    receipt = read_receipt(folder)
    assert receipt.whole
    assert set(receipt.found) == set(FILES)
    assert receipt.found["README.md"] == hashlib.sha256(b"content of README.md").hexdigest()
    assert receipt.get("created").endswith("+00:00")
    assert receipt.get("settings", "method", "deeper") is None


def test_every_single_changed_byte_of_every_file_is_seen(folder: Path) -> None:
    for name in FILES:
        data = (folder / name).read_bytes()
        for place in range(len(data)):
            (folder / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert refusals(folder) == [("file-changed", name)]
        (folder / name).write_bytes(data)
    assert refusals(folder) == []


def turn_into_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target.name)
    target.rename(path.parent.parent / "elsewhere")
    path.unlink()
    path.symlink_to(path.parent.parent / "elsewhere")


def turn_into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "rule"),
    [
        (Path.unlink, "file-missing"),
        (lambda path: path.write_bytes(b""), "file-changed"),
        (turn_into_link, "file-link"),
        (turn_into_pipe, "file-unreadable"),
        (turn_into_folder, "file-unreadable"),
    ],
    ids=["missing", "empty", "link", "pipe", "folder"],
)
def test_a_file_that_is_not_the_one_is_named(folder: Path, harm: Callable[[Path], Any], rule: str) -> None:
    harm(folder / "README.md")
    assert (rule, "README.md") in refusals(folder)


def test_a_linked_folder_is_a_link(folder: Path) -> None:
    (folder / "dense").rename(folder.parent / "dense")
    (folder / "dense").symlink_to(folder.parent / "dense")
    assert ("file-link", "dense/config.json") in refusals(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "dense/model.safetensors", ".hidden", "sub/.cache/x", "dense/.git"]
)
def test_a_file_that_nobody_vouches_for_is_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    assert refusals(folder) == [("file-surplus", name)]


def test_a_dangling_link_is_surplus_and_what_the_hub_adds_is_not(folder: Path) -> None:
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x").write_text("x")
    assert refusals(folder) == []
    (folder / "model.bin").symlink_to("nowhere")
    assert refusals(folder) == [("file-surplus", "model.bin")]


HASH = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "{}",
        '{"files": {}}',
        '{"files": ["README.md"]}',
        '{"files": {"README.md": {"sha256": "abc", "bytes": 1}}}',
        '{"files": {"README.md": {"sha256": "HASH", "bytes": true}}}',
        '{"files": {"../secret": {"sha256": "HASH", "bytes": 1}}}',
        '{"files": {"/etc/passwd": {"sha256": "HASH", "bytes": 1}}}',
        '{"files": {"a//b": {"sha256": "HASH", "bytes": 1}}}',
        '{"files": {"C:\\\\x": {"sha256": "HASH", "bytes": 1}}}',
        '{"files": {"x": {"sha256": "HASH", "bytes": 1}}, "files": {}}',
        '{"files": {"x": {"sha256": "HASH", "bytes": 1}}, "a": NaN}',
        "[" * 100_000,
        "\ufeff{}",
    ],
)
def test_what_is_no_receipt_is_refused_and_nothing_is_read_for_it(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text.replace("HASH", HASH), encoding="utf-8")
    receipt = read_receipt(folder)
    assert [item.rule for item in receipt.findings] == ["receipt-unreadable"]
    assert not receipt.whole and receipt.found == {}


def test_a_receipt_that_is_missing_a_link_or_a_pipe_is_refused(folder: Path) -> None:
    (folder / MANIFEST).rename(folder / "other")
    assert refusals(folder) == [("receipt-missing", None)]
    (folder / MANIFEST).symlink_to("other")
    assert refusals(folder) == [("file-link", MANIFEST)]
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    assert refusals(folder) == [("receipt-unreadable", MANIFEST)]


def make_keys(place: Path, name: str) -> tuple[Path, Path]:
    """A key pair on P-256."""
    ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    from cryptography.hazmat.primitives import serialization as form

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = place / f"{name}.pem", place / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    info = form.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, info))
    return private, public


@pytest.fixture
def signed(folder: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """The little artifact, signed; its signer's public key, and a stranger's."""
    pytest.importorskip("model_signing")
    from bshub.release.signature import sign_receipt

    private, public = make_keys(tmp_path, "signer")
    sign_receipt(folder, private)
    return folder, public, make_keys(tmp_path, "stranger")[1]


def level(folder: Path, key: Path | None, wanted: str | None = None) -> str:
    from bshub.release.signature import verify_signature

    return verify_signature(read_receipt(folder), key, wanted).level


def test_the_signature_holds_for_its_signer_alone(signed: tuple[Path, Path, Path]) -> None:
    folder, public, stranger = signed
    fingerprint = "sha256:" + hashlib.sha256(public.read_bytes()).hexdigest()
    hint = json.loads((folder / SIGNATURE).read_text())["verificationMaterial"]["publicKey"]["hint"]
    assert fingerprint == f"sha256:{hint}"
    assert read_receipt(folder).whole
    assert level(folder, public) == level(folder, public, fingerprint) == "pass"
    assert level(folder, stranger) == level(folder, stranger, fingerprint) == "refused"
    assert level(folder, public, "sha256:" + HASH) == "refused"
    assert level(folder, None, fingerprint) == "inconclusive"
    assert level(folder, None) == "note"


def test_model_signing_itself_agrees(signed: tuple[Path, Path, Path]) -> None:
    from model_signing.verifying import Config

    folder, public, stranger = signed
    Config().use_elliptic_key_verifier(public_key=public).verify(folder / MANIFEST, folder / SIGNATURE)
    with pytest.raises(ValueError, match="Key mismatch"):
        Config().use_elliptic_key_verifier(public_key=stranger).verify(folder / MANIFEST, folder / SIGNATURE)
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text() + " ")
    with pytest.raises(ValueError, match="Signature mismatch"):
        Config().use_elliptic_key_verifier(public_key=public).verify(folder / MANIFEST, folder / SIGNATURE)
    assert level(folder, public) == "refused"


def test_somebody_who_rewrites_file_and_receipt_is_caught_by_the_signature(signed: tuple[Path, Path, Path]) -> None:
    folder, public, _ = signed
    signature = (folder / SIGNATURE).read_bytes()
    (folder / SIGNATURE).unlink()
    assert level(folder, public) == "refused"
    (folder / "model.safetensors").write_text("backdoored")
    write_report(folder, {"settings": {"method": "bshub"}, "counts": {}})
    (folder / SIGNATURE).write_bytes(signature)
    assert read_receipt(folder).whole
    assert level(folder, public) == "refused"


def change_statement(bundle: dict[str, Any], old: bytes, new: bytes) -> None:
    body = base64.b64decode(bundle["dsseEnvelope"]["payload"]).replace(old, new)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(body).decode()


@pytest.mark.parametrize(
    "harm",
    [
        lambda bundle: bundle.clear(),
        lambda bundle: bundle.update(dsseEnvelope=[]),
        lambda bundle: bundle["dsseEnvelope"].update(signatures=[]),
        lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain"),
        lambda bundle: bundle["dsseEnvelope"].update(payload="%%%"),
        lambda bundle: bundle["dsseEnvelope"]["signatures"][0].update(sig="AAAA"),
        lambda bundle: bundle["dsseEnvelope"]["signatures"][0].update(sig=7),
        lambda bundle: change_statement(bundle, b"sha256", b"sha512"),
    ],
)
def test_a_broken_signature_is_refused_and_crashes_nothing(
    signed: tuple[Path, Path, Path], harm: Callable[[dict[str, Any]], Any]
) -> None:
    folder, public, _ = signed
    bundle = json.loads((folder / SIGNATURE).read_text())
    harm(bundle)
    write_json(folder / SIGNATURE, bundle)
    assert level(folder, public) == "refused"
    (folder / SIGNATURE).write_text("not json")
    assert level(folder, public) == "refused"


def test_a_key_that_cannot_be_used_is_told_before_any_work(tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    from bshub.release.signature import check_key

    (tmp_path / "text.pem").write_text("no key")
    for key in (tmp_path / "text.pem", tmp_path / "missing.pem", make_keys(tmp_path, "x")[1]):
        with pytest.raises(UsageError) as caught:
            check_key(key)
        assert "openssl" in str(caught.value.hint)
    check_key(tmp_path / "x.pem")


def test_sanitize_signs_what_verify_and_the_gate_ask_for(tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    private, public = make_keys(tmp_path, "signer")
    place = tmp_path / "artifact"
    made = bshub_command(
        "sanitize", DEMO / "model", "--clean-dir", DEMO / "clean",
        "--score", "lipschitz", "--finetune-epochs", 0, "--no-onnx", "--no-report",
        "--sign", private, "-o", place,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    result = bshub_command("verify", place, "--key", public, "--json")
    assert result.exit_code == 0, result.output
    assert [item["level"] for item in json.loads(result.stdout)["findings"]] == ["pass", "pass"]
    (place / SIGNATURE).unlink()
    assert bshub_command("verify", place, "--key", public).exit_code == 1
    assert bshub_command("verify", place).exit_code == 0


def test_a_bad_signing_key_stops_sanitize_before_it_works(tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    result = bshub_command(
        "sanitize", DEMO / "model", "--clean-dir", DEMO / "clean", "--sign", tmp_path / "no.pem", "-o", tmp_path / "out"
    )
    assert result.exit_code == 2
    assert "no.pem cannot be read" in result.stderr
    assert not (tmp_path / "out").exists()
