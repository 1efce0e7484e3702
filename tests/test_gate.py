"""The gate: each reason not to ship an artifact, with its exit code; what is whole passes; nothing crashes."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import DEMO, Artifact, bshub_command
from junitparser import Failure, JUnitXml, Skipped
from little_onnx import linear_onnx
from sarif_schema import check_sarif

from bshub.errors import UsageError
from bshub.files import MANIFEST
from bshub.gate import gate
from bshub.release.artifact import write_json, write_report
from bshub.release.finding import RULES, Finding, Verdict
from bshub.release.judge import judge_receipt
from bshub.release.junit import junit
from bshub.release.policy import DEFAULT, Policy, older, read_policy
from bshub.release.receipt import Receipt, read_receipt
from bshub.release.sarif import fingerprint, sarif

LAX = Policy(sha256="0" * 64)


@pytest.fixture
def folder(artifact: Artifact, tmp_path: Path) -> Path:
    """A copy of the demo's artifact that may be harmed."""
    place = tmp_path / "artifact"
    shutil.copytree(artifact.folder, place)
    return place


def verdict_of(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and document of a gate."""
    result = bshub_command("gate", *arguments, "--json")
    assert "Traceback" not in result.output
    return result.exit_code, json.loads(result.stdout)


def rules(document: dict[str, Any], level: str = "refused") -> set[str]:
    return {item["rule"] for item in document["findings"] if item["level"] == level}


def rebind(folder: Path, **changes: Any) -> None:
    """Rewrite the receipt with other statements over whatever the folder holds now, as a forger would."""
    record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    created = {"created": changes["created"]} if "created" in changes else {}
    write_report(folder, {**record, **changes})
    if created:
        written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        write_json(folder / MANIFEST, {**written, **created})


def policy_file(place: Path, **asked: Any) -> Path:
    """A policy that asks only this."""
    place.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in asked.items()), encoding="utf-8")
    return place


def test_an_untouched_artifact_passes_the_default_policy(artifact: Artifact) -> None:
    code, document = verdict_of(artifact.folder)
    assert (code, document["verdict"], document["depth"]) == (0, "pass", "receipt")
    weights = json.loads((artifact.folder / MANIFEST).read_text())["files"]["model.safetensors"]["sha256"]
    assert document["weights_sha256"] == weights
    assert {"accuracy", "accuracy-drop", "asr", "age", "method", "version", "proof"} <= rules(document, "pass")
    assert verdict_of(artifact.folder / "model.safetensors")[0] == 0


def flip_weight(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def edit_card(folder: Path) -> None:
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("n=100", "n=10000") + "\n", encoding="utf-8")


def swap_onnx(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"one")
    rebind(folder, onnx={"holds": True})
    (folder / "model.onnx").write_bytes(b"two")


def unread(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def link(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


@pytest.mark.parametrize(
    ("harm", "rule"),
    [
        (flip_weight, "file-changed"),
        (edit_card, "file-changed"),
        (swap_onnx, "file-changed"),
        (lambda folder: (folder / "metrics.json").unlink(), "file-missing"),
        (unread, "file-unreadable"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), "file-surplus"),
        (link, "file-link"),
        (lambda folder: (folder / MANIFEST).unlink(), "receipt-missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "receipt-unreadable"),
        (lambda folder: rebind(folder, created="2020-01-01T00:00:00+00:00"), "age"),
        (lambda folder: rebind(folder, created="2999-01-01T00:00:00+00:00"), "age"),
        (lambda folder: rebind(folder, settings={"method": "ft"}), "method"),
        (lambda folder: rebind(folder, versions={"bshub": "0.0.9"}), "version"),
        (lambda folder: rebind(folder, versions={}), "version"),
        (lambda folder: rebind(folder, proof={"holds": False}), "proof"),
        (lambda folder: rebind(folder, settings={}, command="attack"), "sanitized"),
    ],
)
def test_each_harm_is_refused_with_its_reason_and_the_next_step(
    folder: Path, harm: Callable[[Path], Any], rule: str
) -> None:
    harm(folder)
    code, document = verdict_of(folder)
    assert (code, document["verdict"]) == (1, "refused")
    assert rule in rules(document)
    assert all(item["message"] and item["hint"] for item in document["findings"] if item["level"] == "refused")
    shown = bshub_command("gate", folder)
    assert shown.exit_code == 1
    assert "REFUSED" in shown.stdout and rule in shown.stdout and "→" in shown.stdout


def test_a_model_or_a_lone_onnx_file_has_no_receipt(folder: Path, tmp_path: Path) -> None:
    for target in (DEMO / "model", DEMO / "model" / "model.safetensors", tmp_path / "lone.onnx"):
        (tmp_path / "lone.onnx").write_bytes(b"x")
        code, document = verdict_of(target)
        assert code == 1
        assert rules(document) == {"receipt-missing"}
        assert "bshub sanitize" in document["findings"][0]["hint"]
    (folder / "other.onnx").write_bytes(b"x")
    assert rules(verdict_of(folder / "other.onnx")[1]) == {"file-surplus"}


def test_a_dense_copy_is_sent_to_the_artifact_around_it(folder: Path) -> None:
    write_report(folder, {"kind": "dense copy", "proof": {"holds": True}})
    code, document = verdict_of(folder)
    assert code == 1
    assert {item.get("hint") for item in document["findings"] if item["rule"] == "sanitized"} == {
        "gate the folder above it"
    }


@pytest.mark.parametrize(
    ("asked", "code", "rule"),
    [
        ({"min_accuracy": 99.9}, 1, "accuracy"),
        ({"min_accuracy": 0}, 0, None),
        ({"max_asr": 0.0, "worst_case": True}, 1, "asr"),
        ({"max_accuracy_drop": 0}, None, None),
        ({"min_accuracy": 1, "min_images": 101}, 3, "images"),
        ({"methods": ["paper"]}, 1, "method"),
        ({"min_bshub": "99"}, 1, "version"),
        ({"max_age_days": 0}, 1, "age"),
        ({"licences": ["apache-2.0"]}, 0, None),
        ({"licences": ["mit"]}, 1, "licence"),
        ({"licences": []}, 1, "licence"),
        ({"required_files": ["model.onnx"]}, 1, "file-required"),
        ({"signer": "sha256:" + "0" * 64}, 1, "signature"),
        ({"max_suspicious": 10_000}, 3, "suspicious-filters"),
        ({}, 0, None),
    ],
)
def test_another_policy_another_verdict(
    artifact: Artifact, tmp_path: Path, asked: dict[str, Any], code: int | None, rule: str | None
) -> None:
    found, document = verdict_of(artifact.folder, "--policy", policy_file(tmp_path / "p.toml", **asked))
    if code is None:  # as the artifact happens to be
        after, before = (artifact.report["evaluation"][when]["accuracy"]["percent"] for when in ("after", "before"))
        code = int(before - after > 0)
    assert found == code, document
    if rule:
        assert rule in rules(document, "refused" if code == 1 else "inconclusive")


def test_what_was_never_measured_is_inconclusive_and_an_unknown_trigger_is_not(folder: Path) -> None:
    record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for when in ("before", "after"):
        del record["evaluation"][when]["asr"]
    rebind(folder, evaluation=record["evaluation"])
    assert gate(folder, Policy(max_asr=1.0)).code == 0
    assert gate(folder, Policy(max_asr=1.0, require_asr=True)).code == 3
    rebind(folder, evaluation=None)
    verdict = gate(folder, read_policy(None))
    assert verdict.code == 3
    assert {item.rule for item in verdict.findings if item.level == "inconclusive"} == {"accuracy", "accuracy-drop"}
    rebind(folder, evaluation={"after": {"accuracy": {"percent": 500.0, "low": 0, "high": 900, "n": 100}}})
    assert gate(folder, Policy(min_accuracy=1.0)).code == 3


def test_in_the_worst_case_the_end_of_what_was_lost_is_judged(folder: Path) -> None:
    def code(bound: float, worst: bool, lost: Any) -> int:
        rates = (
            {"percent": 80.0, "low": 77.0, "high": 83.0, "n": 700},
            {"percent": 79.0, "low": 75.0, "high": 82.0, "n": 700},
        )
        before, after = ({"accuracy": rate} for rate in rates)
        rebind(folder, evaluation={"before": before, "after": after, "accuracy_lost": lost})
        return gate(folder, Policy(max_accuracy_drop=bound, worst_case=worst)).code

    paired = {"points": 1.0, "low": 0.2, "high": 1.8, "lost": 9, "gained": 2, "n": 700}
    assert [code(bound, False, paired) for bound in (0.9, 1.0)] == [1, 0]
    assert [code(bound, True, paired) for bound in (1.7, 1.8)] == [1, 0]
    for nothing in (None, {"high": 0.5}, {"high": "1.8"}, {"high": True}, {"high": 1e9}):  # 1 + √(3² + 4²) points, then
        assert [code(bound, True, nothing) for bound in (5.9, 6.0)] == [1, 0]


def test_age_is_counted_from_the_receipts_own_time(folder: Path) -> None:
    receipt, policy = read_receipt(folder), Policy(max_age_days=30)
    created = datetime.fromisoformat(receipt.record["created"])
    for days, level in ((0, "pass"), (29.9, "pass"), (30.1, "refused"), (-1, "refused")):
        found = {item.rule: item.level for item in judge_receipt(policy, receipt, created + timedelta(days=days))}
        assert found["age"] == level
    for odd in (None, "yesterday", "2026-01-01T00:00:00", 7):
        undated = Receipt(folder, {**receipt.record, "created": odd}, receipt.digest, receipt.found, ())
        assert {item.rule: item.level for item in judge_receipt(policy, undated)}["age"] == "inconclusive"
    assert datetime.now(UTC) >= created


def test_a_pinned_policy_may_not_change(artifact: Artifact, tmp_path: Path) -> None:
    policy = policy_file(tmp_path / "p.toml", min_accuracy=1)
    digest = read_policy(policy).sha256
    assert verdict_of(artifact.folder, "--policy", policy, "--policy-sha256", f"sha256:{digest}")[0] == 0
    policy.write_text("min_accuracy = 0\n")
    code, document = verdict_of(artifact.folder, "--policy", policy, "--policy-sha256", digest)
    assert (code, rules(document)) == (1, {"policy-changed"})


def test_init_writes_the_default_and_never_over_another(tmp_path: Path) -> None:
    place = tmp_path / "policy.toml"
    assert bshub_command("gate", "--init", "--policy", place).exit_code == 0
    assert place.read_text(encoding="utf-8") == DEFAULT
    assert read_policy(place).as_dict()["asks"] == read_policy(None).as_dict()["asks"]
    result = bshub_command("gate", "--init", "--policy", place)
    assert result.exit_code == 2 and "exists" in result.stderr
    told = {line[2:].split(" = ")[0] for line in DEFAULT.splitlines() if line.startswith("# ") and " = " in line}
    assert set(tomllib.loads(DEFAULT)) | told == set(read_policy(None).as_dict()["asks"])


@pytest.mark.parametrize(
    "text",
    [
        "min_acuracy = 1",
        "min_accuracy = nan",
        "min_accuracy = 101",
        "min_accuracy = '90'",
        "min_accuracy = true",
        "max_suspicious = 1.5",
        "min_images = -1",
        "require_asr = 1",
        "methods = 'bshub'",
        "licences = [1]",
        "min_bshub = 'new'",
        "signer = 'sha256:abc'",
        "signer = ''",
        "origin = 'x'",
        "a = 1\na = 2",
        "\x00",
        "#" * (1 << 20) + "\n",
    ],
)
def test_a_policy_that_cannot_be_is_an_error_not_a_pass(artifact: Artifact, tmp_path: Path, text: str) -> None:
    (tmp_path / "p.toml").write_text(text)
    result = bshub_command("gate", artifact.folder, "--policy", tmp_path / "p.toml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("bshub: ") and "unexpected" not in result.stderr


def errs(result: Result) -> bool:
    return result.exit_code == 2 and "unexpected" not in result.stderr and result.stderr.startswith("bshub: ")


def test_what_is_not_there_is_never_a_pass(artifact: Artifact, tmp_path: Path) -> None:
    assert errs(bshub_command("gate"))
    assert errs(bshub_command("gate", tmp_path / "nothing"))
    assert errs(bshub_command("gate", "user/repo"))
    assert errs(bshub_command("gate", artifact.folder, "--policy", tmp_path / "none.toml"))
    shown = bshub_command("gate", artifact.folder, "--sarif", tmp_path / "no" / "x.sarif")
    assert shown.exit_code == 2 and "accuracy" in shown.stdout  # the findings are printed first
    assert Verdict("x", "receipt", (), None, {}).code == 3


@pytest.mark.parametrize(
    ("version", "bound", "is_older"),
    [
        ("0.1.0", "0.1.0", False),
        ("0.1", "0.1.0", False),
        ("0.10.0", "0.9.9", False),
        ("0.9.9", "0.10", True),
        ("1.0.0rc1", "1.0.0", True),
        ("1.0.0.dev3", "1.0.0", True),
        ("1.0.0+local", "1.0.0", False),
        ("1.0.0.post1", "1.0.0", False),
        ("unknown", "0.0.1", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, bound: str, is_older: bool) -> None:
    assert older(version, bound) is is_older


def test_sarif_is_valid_and_its_fingerprints_follow_weights_layer_and_channel(folder: Path, tmp_path: Path) -> None:
    flip_weight(folder)
    edit_card(folder)
    result = bshub_command("gate", folder, "--sarif", tmp_path / "x.sarif", "--junit", tmp_path / "x.xml")
    assert result.exit_code == 1 and "REFUSED" in result.stdout
    log = json.loads((tmp_path / "x.sarif").read_text(encoding="utf-8"))
    check_sarif(log)
    (run,) = log["runs"]
    names = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert names == list(RULES)
    assert {names[item["ruleIndex"]] for item in run["results"]} == {item["ruleId"] for item in run["results"]}
    files = [
        item["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        for item in run["results"]
        if item["level"] == "error"
    ]
    assert sorted(files) == ["README.md", "model.safetensors"]
    (suite,) = JUnitXml.fromfile(str(tmp_path / "x.xml"))
    assert (suite.failures, suite.errors, suite.tests) == (2, 0, len(list(suite)))
    assert sum(isinstance(result, Failure) for case in suite for result in case.result) == 2
    assert sum(isinstance(result, Skipped) for case in suite for result in case.result) == suite.skipped
    marks = {
        fingerprint(Finding("asr", "refused", "text", layer=layer, channel=channel), weights)
        for weights in ("a", "b", None)
        for layer in ("conv1", "conv2", None)
        for channel in (0, 1, None)
    }
    assert len(marks) == 27


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_sarif_into_a_pipe_is_written_into_it(folder: Path, tmp_path: Path) -> None:
    """``--sarif /dev/stdout``: what is no regular file is not replaced by one."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        bshub_command("gate", folder, "--sarif", tmp_path / "pipe")
        assert json.loads(os.read(reader, 1 << 20))["version"] == "2.1.0"
    finally:
        os.close(reader)
    assert [path.name for path in tmp_path.iterdir() if path != folder] == ["pipe"]


def test_hostile_names_reach_sarif_and_junit_escaped() -> None:
    odd = Finding("file-surplus", "refused", "a\x1b[31m<b>\ud800", "]]>&", "sub dir/ä\u202e.bin", "conv<1>", 3)
    verdict = Verdict("x", "measure", (odd,), None, LAX.as_dict())
    log = json.loads(json.dumps(sarif(verdict, "0.1.0")))
    check_sarif(log)
    ((case,),) = JUnitXml.fromstring(junit(verdict).encode())
    assert "\x1b" not in junit(verdict)
    assert case.result[0].message == "a\\x1b[31m<b>\\ud800"


def test_measuring_finds_what_a_forged_receipt_hides(folder: Path, artifact: Artifact) -> None:
    linear_onnx(folder / "model.onnx")
    rebind(folder, onnx={"holds": True}, evaluation=None)
    assert gate(folder, LAX).code == 0
    asked = Policy(min_accuracy=50, max_asr=50, require_asr=True, max_suspicious=0, suspicious_mu=1.0)
    verdict = gate(folder, asked, test_dir=artifact.test_dir, trigger=DEMO / "trigger.json", device="cpu")
    found = {item.rule: item.level for item in reversed(verdict.findings)}  # the first of each rule counts
    assert verdict.code == 1 and verdict.depth == "measure"
    assert found["loads"] == found["accuracy"] == found["asr"] == "pass"
    assert found["onnx-parity"] == found["suspicious-filters"] == "refused"
    suspects = [item for item in verdict.findings if item.layer]
    assert 0 < len(suspects) <= 20 and all(item.channel is not None for item in suspects)
    check_sarif(sarif(verdict, "0.1.0"))


def test_a_changed_artifact_is_never_loaded_and_an_unloadable_one_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**config, "architecture": "resnet34"})
    changed = gate(folder, LAX, measure=True)
    assert changed.code == 1
    assert "loads" not in {item.rule for item in changed.findings if item.level != "note"}
    rebind(folder)
    unloadable = gate(folder, LAX, measure=True)
    assert {item.rule for item in unloadable.findings if item.level == "refused"} == {"loads"}


def test_images_that_cannot_be_used_are_an_error(artifact: Artifact, tmp_path: Path) -> None:
    assert errs(bshub_command("gate", artifact.folder, "--clean-dir", tmp_path / "none", "-q"))
    assert errs(bshub_command("gate", artifact.folder, "--trigger", DEMO / "trigger.json", "-q"))
    with pytest.raises(UsageError):
        gate(tmp_path / "none", LAX, measure=True)
    with pytest.raises(UsageError):
        gate(Path("a\0b"), LAX)


@pytest.mark.slow
def test_a_complete_artifact_passes_when_it_is_measured(complete: Artifact) -> None:
    result = bshub_command(
        "gate", complete.folder, "--test-dir", complete.test_dir, "--trigger", DEMO / "trigger.json", "--json"
    )
    document = json.loads(result.stdout)
    assert result.exit_code == 0, document
    assert {"onnx-parity", "accuracy", "asr", "loads"} <= rules(document, "pass")
