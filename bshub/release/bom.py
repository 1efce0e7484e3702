"""The bill of materials beside the receipt, ``bom.cdx.json``: CycloneDX 1.6 with the model as its subject.

What the artifact is made of (its files, the model it was made from, the libraries that made it) in the form that
inventories and vulnerability scanners read. The receipt binds it like every other file. Two runs that wrote the same
files at the same second have the same bill: the serial number is derived from the digests.

Source: ECMA-424, CycloneDX 1.6; the model card is its ``modelCard``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType, Pedigree
from cyclonedx.model.license import License, LicenseAcknowledgement
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from bshub.errors import printable
from bshub.intake.models import LoadedModel
from bshub.release.artifact import WEIGHTS
from bshub.release.bom_card import card_of

BOM = "bom.cdx.json"
_SERIAL = uuid.UUID("3b1f7c1e-6d0a-5c52-9a53-0b3e6a2f4c71")  # of nothing else: the namespace of our serial numbers
_HEAD = ("$schema", "bomFormat", "specVersion", "serialNumber", "version", "metadata")
_MAX = 300


def bill_of_materials(
    source: LoadedModel, record: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]], created: datetime
) -> dict[str, Any]:
    """The bill of an artifact.

    Args:
        source: The model before.
        record: What the receipt will state of the run.
        files: Path → ``sha256`` of every other file of the artifact; ``model.safetensors`` is one.
        created: The receipt's time.

    Returns:
        A JSON object, valid by the strict schema of CycloneDX 1.6; everything foreign in it is printable.
    """
    digest = files[WEIGHTS]["sha256"]
    parts = [_file(name, entry["sha256"]) for name, entry in sorted(files.items()) if name != WEIGHTS]
    name = printable(source.origin.base_model or source.origin.architecture.name, _MAX)
    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        name=f"{name}, sanitized",
        version=digest[:12],
        description=f"{WEIGHTS}: {name} without the filters that most looked like carriers of a backdoor",
        hashes=[_sha256(digest)],
        licenses=_licences(source.origin.licence),
        pedigree=Pedigree(ancestors=[_ancestor(source, record)]),
        components=parts,
        properties=_properties(record),
    )
    versions = dict(record.get("versions") or {})
    maker = _library("bshub", versions.pop("bshub", "unknown"), ComponentType.APPLICATION)
    libraries = [
        _library(name, version, ComponentType.PLATFORM if name == "python" else ComponentType.LIBRARY)
        for name, version in versions.items()
    ]
    text = "\n".join(f"{name} {entry['sha256']}" for name, entry in sorted(files.items()))
    bom = Bom(
        serial_number=uuid.uuid5(_SERIAL, f"{created.isoformat(timespec='seconds')}\n{text}"),
        metadata=BomMetaData(
            timestamp=created.replace(microsecond=0), tools=ToolRepository(components=[maker]), component=model
        ),
        components=libraries,
    )
    bom.register_dependency(model, libraries)
    told: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    told["metadata"]["component"]["modelCard"] = card_of(source, record)  # which the library cannot write yet
    return {key: told[key] for key in (*_HEAD, *sorted(told.keys() - set(_HEAD)))}


def _ancestor(source: LoadedModel, record: Mapping[str, Any]) -> Component:
    """The model it was made from: by its Hub id where it has one, and by the digest of its weights."""
    origin = source.origin
    digest, purl, revision = origin.weights_sha256, None, None
    name = origin.base_model or str(record["model"]["reference"])
    if origin.base_model:
        space, _, repository = origin.base_model.rpartition("/")
        typed, _, wanted = origin.reference.partition("@")
        revision = wanted or None if typed.endswith(origin.base_model) else None
        purl = PackageURL("huggingface", space or None, repository, revision)
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="base-model",
        name=printable(name, _MAX),
        version=printable(revision, _MAX) if revision else digest[:12] if digest else None,
        purl=purl,
        hashes=[_sha256(digest)] if digest else [],
        licenses=_licences(origin.licence),
    )


def _file(name: str, digest: str) -> Component:
    return Component(
        type=ComponentType.FILE, bom_ref=f"file:{printable(name, _MAX)}", name=name, hashes=[_sha256(digest)]
    )


def _library(name: str, version: str, kind: ComponentType) -> Component:
    purl = None if kind is ComponentType.PLATFORM else PackageURL("pypi", None, name, version)
    return Component(type=kind, bom_ref=f"{name}@{version}", name=name, version=version, purl=purl)


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _licences(licence: str | None) -> list[License]:
    """SPDX's id where there is one, whatever its case; else the name as its source states it."""
    text = printable(licence or "", 100).strip()
    declared = LicenseAcknowledgement.DECLARED
    return [LicenseFactory().make_from_string(text, license_acknowledgement=declared)] if text else []


def _properties(record: Mapping[str, Any]) -> list[Property]:
    """How it was made, in the words of the receipt."""
    settings, diagnosis = record["settings"], record["diagnosis"]
    told = {
        **{name: settings[name] for name in ("method", "score", "budget", "repair", "finetune_epochs", "seed")},
        "mu": diagnosis["threshold"]["mu"],
        "mu-asked": settings["mu"],
        **{name: record["counts"][name] for name in ("flagged", "removed", "silenced", "followers")},
        **({"shrink": settings["shrink"], "spare": record["counts"]["spare"]} if "shrink" in record else {}),
        "clean-images": record["clean_images"]["n"],
        "proof-error": record["proof"]["error"],
        **({"onnx-error": record["onnx"]["error"]} if "onnx" in record else {}),
    }
    return [
        Property(name=f"bshub:{name.replace('_', '-')}", value=printable(value, _MAX)) for name, value in told.items()
    ]
