"""The licence of a model is the one that its source states, in its configuration or on its card; never a guess."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from loopback_hub import LoopbackHub, point_client_at
from safetensors.torch import save_file

import bshub
from bshub.intake.licence import stated_licence


@pytest.mark.parametrize(
    ("front", "wanted"),
    [
        ("license: cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("tags:\n- x\nlicense: 'mit'  # as the code\nlibrary_name: timm", "mit"),
        ("license: other\nlicense_name: own-terms\nlicense_link: LICENSE", "own-terms"),
        ("license: other", "other"),
        ("license_name: own-terms", None),
        ("license:\n- mit\n- apache-2.0", None),  # which of them holds is not for us to say
        ("license: &a mit", None),
        ("x:\n  license: mit", None),
        ("license: \x1b[2Jmit", None),
        ("", None),
    ],
)
def test_the_licence_is_what_the_front_matter_states(front: str, wanted: str | None) -> None:
    assert stated_licence(f"---\n{front}\n---\n# A card\nlicense: gpl-3.0\n") == wanted
    assert stated_licence(f"---\r\n{front}\r\n---\r\n".replace("\n", "\r\n").replace("\r\r", "\r")) == wanted
    assert stated_licence(f"# No front matter\n{front}\n") is None


def a_model(folder: Path, licence: str | None) -> dict[str, bytes]:
    torch.manual_seed(0)
    folder.mkdir()
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / "model.safetensors")
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {"license": licence}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_configuration_comes_first_then_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, open_about_it = a_model(tmp_path / "silent", None), a_model(tmp_path / "said", "mit")
    assert bshub.load(str(tmp_path / "silent")).origin.licence == "cc-by-4.0"
    assert bshub.load(str(tmp_path / "said")).origin.licence == "mit"
    with LoopbackHub() as hub:
        point_client_at(hub.url, monkeypatch, tmp_path / "cache")
        hub.seed("me/silent", silent)
        hub.seed("me/said", open_about_it)
        hub.seed("me/bare", {name: data for name, data in silent.items() if name != "README.md"})
        assert bshub.load("me/silent").origin.licence == "cc-by-4.0"
        assert bshub.load("me/said").origin.licence == "mit"
        assert bshub.load("me/bare").origin.licence is None
