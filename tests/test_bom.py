"""The bill of materials: strictly valid CycloneDX 1.6 whatever a model says of itself, and bound by the receipt."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, Artifact, bshub_command
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import given, settings
from hypothesis import strategies as st

import bshub
from bshub.files import MANIFEST, json_text, sha256
from bshub.gate import gate
from bshub.intake.models import LoadedModel
from bshub.release.artifact import file_digests
from bshub.release.bom import BOM, bill_of_materials
from bshub.release.policy import Policy

WHEN = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
FILES = {"model.safetensors": {"sha256": "1" * 64}, "README.md": {"sha256": "2" * 64}}


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    return bshub.load(str(DEMO / "model"))


@pytest.fixture(scope="module")
def record(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.folder / MANIFEST).read_text(encoding="utf-8"))


def faults(bill: dict[str, Any]) -> str | None:
    """What the strict schema of CycloneDX 1.6 says against it."""
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json_text(bill))
    return None if error is None else str(error)


def coming_from(source: LoadedModel, **changes: Any) -> LoadedModel:
    return replace(source, origin=replace(source.origin, **changes))


def test_the_bill_of_an_artifact_is_valid_and_says_what_it_is_made_of(artifact: Artifact, record: dict) -> None:
    bill = json.loads((artifact.folder / BOM).read_text(encoding="utf-8"))
    assert faults(bill) is None
    model = bill["metadata"]["component"]
    (weights,), (base,) = model["hashes"], model["pedigree"]["ancestors"]
    assert model["type"] == base["type"] == "machine-learning-model"
    assert weights == {"alg": "SHA-256", "content": sha256(artifact.folder / "model.safetensors")}
    assert base["hashes"] == [{"alg": "SHA-256", "content": sha256(DEMO / "model" / "model.safetensors")}]
    assert model["licenses"][0]["license"]["id"] == base["licenses"][0]["license"]["id"] == "Apache-2.0"
    parts = {part["name"]: part["hashes"][0]["content"] for part in model["components"]}
    assert parts == {
        name: entry["sha256"] for name, entry in record["files"].items() if name not in ("model.safetensors", BOM)
    }
    libraries = {part["name"]: part["version"] for part in bill["components"]}
    assert libraries | {"bshub": bshub.__version__} == record["versions"]
    (made,) = [node["dependsOn"] for node in bill["dependencies"] if node["ref"] == "model"]
    assert len(made) == len(libraries)
    assert bill["metadata"]["timestamp"] == record["created"]
    told = {item["name"]: item["value"] for item in model["properties"]}
    assert told["bshub:method"] == "bshub" and told["bshub:seed"] == "0"
    assert float(told["bshub:mu"]) == record["diagnosis"]["threshold"]["mu"]


def test_its_card_states_every_rate_with_its_interval(artifact: Artifact, record: dict) -> None:
    card = json.loads((artifact.folder / BOM).read_text(encoding="utf-8"))["metadata"]["component"]["modelCard"]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    found = {(metric["type"], metric["slice"]): metric for metric in metrics}
    assert len(found) == len(metrics) == 8
    for key, words in (("accuracy", "accuracy"), ("asr", "attack success rate"), ("ra", "robust accuracy")):
        for when in ("before", "after"):
            rate = record["evaluation"][when][key]
            metric = found[words, f"test images, {when} sanitizing, n={rate['n']}"]
            ends = metric["confidenceInterval"]
            told = [float(text) for text in (ends["lowerBound"], metric["value"], ends["upperBound"])]
            assert told == pytest.approx([rate[name] / 100 for name in ("low", "percent", "high")], abs=1e-6)
    assert card["modelParameters"]["modelArchitecture"] == "timm/resnet18"
    assert any("trigger" in text for text in card["considerations"]["technicalLimitations"])


def test_without_test_images_the_card_says_that_no_trigger_was_known(source: LoadedModel, record: dict) -> None:
    bill = bill_of_materials(source, {**record, "evaluation": None}, FILES, WHEN)
    assert faults(bill) is None
    card = bill["metadata"]["component"]["modelCard"]
    assert all("clean images" in metric["slice"] for metric in card["quantitativeAnalysis"]["performanceMetrics"])
    assert any("No trigger was known" in text for text in card["considerations"]["technicalLimitations"])


def test_the_receipt_binds_it_and_a_policy_can_ask_for_it(artifact: Artifact, tmp_path: Path) -> None:
    place = tmp_path / "artifact"
    made = bshub_command(
        "sanitize", DEMO / "model", "--clean-dir", DEMO / "clean",
        "--score", "lipschitz", "--finetune-epochs", 0, "--no-onnx", "--no-report",
        "-o", place,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    asked = Policy(required_files=(BOM,))
    assert gate(place, asked).code == 0
    bill = (place / BOM).read_text(encoding="utf-8")
    (place / BOM).write_text(bill.replace("Apache-2.0", "MIT"), encoding="utf-8")
    assert [(item.rule, item.path) for item in gate(place, asked).findings if item.level == "refused"] == [
        ("file-changed", BOM)
    ]
    (place / BOM).unlink()
    assert "file-missing" in {item.rule for item in gate(place, asked).findings if item.level == "refused"}


def test_the_same_files_at_the_same_time_have_the_same_bill(source: LoadedModel, record: dict, artifact: Any) -> None:
    files = file_digests(artifact.folder)
    one, other = (bill_of_materials(source, record, files, WHEN) for _ in range(2))
    assert json_text(one) == json_text(other)
    later = bill_of_materials(source, record, files, WHEN + timedelta(seconds=1))
    changed = bill_of_materials(source, record, {**files, "model.safetensors": {"sha256": "0" * 64}}, WHEN)
    assert len({bill["serialNumber"] for bill in (one, later, changed)}) == 3


def test_a_base_model_of_the_hub_is_named_by_its_package_url(source: LoadedModel, record: dict) -> None:
    known = coming_from(source, reference="user/repo@v1.2", base_model="user/repo", licence="bsd")
    bill = bill_of_materials(known, record, FILES, WHEN)
    assert faults(bill) is None
    (base,) = bill["metadata"]["component"]["pedigree"]["ancestors"]
    assert (base["name"], base["version"], base["purl"]) == ("user/repo", "v1.2", "pkg:huggingface/user/repo@v1.2")
    assert base["licenses"] == [{"license": {"acknowledgement": "declared", "name": "bsd"}}]  # no id of SPDX
    unpinned = coming_from(source, reference="timm/resnet18", base_model="timm/resnet18.a1_in1k", licence=None)
    bill = bill_of_materials(unpinned, record, FILES, WHEN)
    assert faults(bill) is None
    (base,) = bill["metadata"]["component"]["pedigree"]["ancestors"]
    assert base["purl"] == "pkg:huggingface/timm/resnet18.a1_in1k" and "licenses" not in base


@settings(max_examples=60, deadline=None)
@given(
    st.text() | st.sampled_from(["", " ", "mit", "MIT OR Apache-2.0", "other", "GPL-3.0\n", "((", "a" * 500, "\ud800"]),
    st.text(),
    st.none() | st.just("user/repo"),
    st.text(),
)
def test_whatever_a_model_says_of_itself_the_bill_is_valid(
    source: LoadedModel, record: dict, licence: str, reference: str, base: str | None, warning: str
) -> None:
    odd = coming_from(source, licence=licence, reference=reference, base_model=base)
    told = copy.deepcopy(record) | {"warnings": [warning]}
    told["model"]["reference"] = reference
    bill = bill_of_materials(odd, told, FILES, WHEN)
    assert faults(bill) is None
    assert json_text(bill).replace("\n", "").isprintable()


def test_the_validator_would_notice(source: LoadedModel, record: dict) -> None:
    bill = bill_of_materials(source, record, FILES, WHEN)
    bill["metadata"]["component"]["modelCard"]["odd"] = 1
    assert faults(bill) is not None
