"""What a user may type for a model, and what is said when it leads nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import point_client_at
from safetensors.torch import save_file

from bshub.errors import BshubError, CheckpointError, ModelReferenceError
from bshub.intake import hub, weights_url
from bshub.intake.models import load_model
from bshub.intake.reference import FORBIDDEN_ARGUMENTS, Architecture, parse_architecture, parse_reference

TINY = "timm/test_resnet?num_classes=3&input_size=32"


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).eval()


def layout(folder: Path, model: torch.nn.Module, **changes: Any) -> Path:
    """A folder in timm's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    pretrained = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": pretrained, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(call: Any, *args: Any, **kwargs: Any) -> BshubError:
    with pytest.raises(BshubError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    ("text", "library", "name", "tag"),
    [
        ("timm/resnet18", "timm", "resnet18", None),
        ("timm/resnet18.a1_in1k", "timm", "resnet18", "a1_in1k"),
        ("torchvision/resnet50", "torchvision", "resnet50", None),
        ("torchvision/resnet50:IMAGENET1K_V1", "torchvision", "resnet50", "IMAGENET1K_V1"),
    ],
)
def test_architectures(text: str, library: str, name: str, tag: str | None) -> None:
    found = parse_reference(text).architecture
    assert found == Architecture(library, name, tag)


def test_options_of_an_architecture() -> None:
    text = "timm/resnet18?num_classes=10&stem=cifar&input_size=32&mean=0.5,0.4,0.3&std=0.2&channels=8,16&drop_rate=0.1"
    found = parse_architecture(text + "&flag=true&word=gelu")
    assert found.arguments == {
        "num_classes": 10, "channels": [8, 16], "drop_rate": 0.1, "flag": True, "word": "gelu"
    }  # fmt: skip
    assert found.stem == "cifar"
    assert found.preprocessing == {"input_size": 32, "mean": [0.5, 0.4, 0.3], "std": 0.2}


@pytest.mark.parametrize("text", ["user/repo", "user/repo@v1.0", "user/repo@refs/pr/1", "hf-hub:user/repo"])
def test_hub_references(text: str) -> None:
    assert parse_reference(text).repository == text.removeprefix("hf-hub:")


def test_an_existing_path_wins_over_every_other_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("user/repo", "timm/resnet18"):
        (tmp_path / name).mkdir(parents=True)
        assert parse_reference(name).path == Path(name)
    assert parse_reference("local-dir:user/repo").path == Path("user/repo")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"), ("a\0b", "zero byte"), ("./nowhere", "no file or folder"), ("/nowhere/at/all", "no file"),
        ("model.safetensors", "no file"), ("~/nowhere.pth", "no file"), ("resnet18", "did you mean timm/resnet18"),
        ("a b c", "neither"), ("user/repo/sub", "neither"), ("timm/", "not an architecture"),
        ("torchvision/", "not an architecture"), ("timm/resnet18?stem=big", "unknown stem"),
        ("timm/resnet18?x", "not an option"), ("timm/resnet18?a-b=1", "not an option"),
    ],
)  # fmt: skip
def test_what_leads_nowhere_is_said_in_one_line(text: str, said: str) -> None:
    assert said in str(refused(parse_reference, text))


@pytest.mark.parametrize("name", sorted(FORBIDDEN_ARGUMENTS))
def test_constructor_arguments_that_load_or_phone_are_forbidden(name: str, tmp_path: Path, tiny: Any) -> None:
    assert name in str(refused(parse_reference, f"timm/resnet18?{name}=1"))
    error = refused(load_model, str(layout(tmp_path / "m", tiny, model_args={name: "x"})))
    assert "must not choose" in error.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("timm/resnet81", "did you mean timm/resnet"), ("timm/restnet18", "did you mean timm/resnet18?"),
        ("torchvision/resnet81", "did you mean torchvision/resnet"), ("timm/resnet18.a1_in2k", "a1_in1k"),
        ("torchvision/resnet50:IMAGENET1K_V9", "IMAGENET1K_V1"), ("timm/resnet18?colour=red", "cannot build"),
        ("torchvision/resnet18?colour=red", "cannot build"), ("torchvision/qqqqq", "list of torchvision"),
    ],
)  # fmt: skip
def test_typos_get_a_suggestion(text: str, said: str) -> None:
    assert said in str(refused(load_model, text))


@pytest.mark.parametrize("text", ["a" * 5000, "./" + "a" * 300, "~nobody-of-that-name/x"], ids=lambda text: text[:12])
def test_paths_the_system_cannot_take_are_refused(text: str) -> None:
    refused(parse_reference, text)


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="~"), max_size=60))
def test_any_text_is_a_reference_or_one_kind_of_error(text: str) -> None:
    try:
        parsed = parse_reference(text)
    except ModelReferenceError as error:
        assert str(error).isprintable()
    else:
        assert [parsed.architecture, parsed.repository, parsed.path].count(None) == 2


@pytest.mark.parametrize("reference", ["timm/resnet18", "timm/resnet18.a1_in1k", "user/repo", "user/repo@main"])
def test_without_network_one_line_names_the_cache_and_a_way_out(
    reference: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "WAITS", ())
    point_client_at("http://127.0.0.1:9", monkeypatch, tmp_path / "cache")
    text = str(refused(load_model, reference))
    assert "127.0.0.1" in text
    assert str(tmp_path / "cache") in text
    assert "local" in text


def test_torchvision_without_network_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Deaf:
        def open(self, *args: Any, **kwargs: Any) -> Any:
            raise OSError(101, "Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights_url, "build_opener", lambda *handlers: Deaf())
    text = str(refused(load_model, "torchvision/resnet18"))
    assert "download.pytorch.org" in text
    assert not list(tmp_path.rglob("*.pth*"))


def test_a_file_of_weights_needs_its_architecture(tmp_path: Path, tiny: Any) -> None:
    file = layout(tmp_path, tiny) / "model.safetensors"
    assert "--arch" in str(refused(load_model, str(file)))
    loaded = load_model(str(file), arch=TINY)
    assert (loaded.origin.num_classes, loaded.labels, loaded.preprocessing.input_size) == (3, None, (3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.module(x), tiny(x))
    assert not any(module.training for module in loaded.module.modules())
    error = refused(load_model, str(file), arch="timm/test_resnet?num_classes=4&input_size=32")
    assert "--num-classes 3" in str(error)


def test_a_folder_in_timms_layout(tmp_path: Path, tiny: Any) -> None:
    loaded = load_model(str(layout(tmp_path, tiny, label_names=["a", "b", "c"])))
    assert loaded.labels == ("a", "b", "c")
    assert loaded.preprocessing.config["mean"] == [0.5] * 3
    assert torch.equal(loaded.module(torch.ones(1, 3, 32, 32)), tiny(torch.ones(1, 3, 32, 32)))


def test_labels_that_do_not_fit_are_not_used(tmp_path: Path, tiny: Any) -> None:
    assert load_model(str(layout(tmp_path, tiny, label_names=["a", "b"]))).labels is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_a_part_says_which(tmp_path: Path, tiny: Any, name: str) -> None:
    (layout(tmp_path, tiny) / name).unlink()
    assert name in refused(load_model, str(tmp_path)).message


BAD_CONFIGS: list[dict[str, Any]] = [
    {"architecture": None}, {"architecture": "no_such"}, {"architecture": "hf-hub:user/repo"},
    {"architecture": "../test_resnet"}, {"num_classes": -3}, {"num_classes": "3"}, {"num_classes": 4},
    {"model_args": [1]}, {"bshub": [1]}, {"bshub": {"format": 9}}, {"bshub": {"stem": "evil"}},
    {"bshub": {"format": 1, "attributes": {"conv1.0": {"forward": 1}}}},
    {"bshub": {"format": 1, "attributes": {"conv1.0": {"out_channels": 10**6}}}},
    {"bshub": {"format": 1, "attributes": {"nowhere": {"out_channels": 1}}}},
    {"bshub": {"format": 1, "kept": {"conv1.0.weight": {"0": [0, 10**9]}}}},
    {"bshub": {"format": 1, "kept": {"conv9.weight": {"0": [0, 1]}}}},
    {"pretrained_cfg": {"input_size": [3, 32]}}, {"pretrained_cfg": {"input_size": [1, 32, 32]}},
    {"pretrained_cfg": {"input_size": [3, 10**6, 32]}}, {"pretrained_cfg": {"input_size": [3, 32, 32], "std": [0] * 3}},
    {"pretrained_cfg": {"input_size": [3, 32, 32], "interpolation": "magic"}},
    {"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": float("nan")}},
]  # fmt: skip


@pytest.mark.parametrize("changes", BAD_CONFIGS, ids=str)
def test_somebodys_config_cannot_do_harm(tmp_path: Path, tiny: Any, changes: dict[str, Any]) -> None:
    refused(load_model, str(layout(tmp_path, tiny, **changes)))


@pytest.mark.parametrize(
    "pretrained",
    [[1], "x", {"input_size": [3, float("inf"), 32]}, {"input_size": [3, 32, 32], "mean": [float("nan")] * 3},
     {"input_size": [3, 32, 32], "crop_pct": 1e-9}, {"input_size": [3, 32, 32], "crop_pct": -1},
     {"input_size": [3, 32, 32], "crop_mode": "magic"}],
    ids=str,
)  # fmt: skip
def test_nor_can_its_preprocessing(tmp_path: Path, tiny: Any, pretrained: Any) -> None:
    refused(load_model, str(layout(tmp_path, tiny, pretrained_cfg=pretrained)))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"architecture": 5}', "\xff"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, tiny: Any, text: str) -> None:
    (layout(tmp_path, tiny) / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError):
        load_model(str(tmp_path))


def test_the_demo_loads_with_its_own_numbers() -> None:
    loaded = load_model(str(DEMO / "model"))
    assert loaded.preprocessing.input_size == (3, 64, 64)
    assert loaded.labels is not None
    assert loaded.labels[0] == "airplane"
    assert loaded.origin.licence == "apache-2.0"


def test_a_module_with_a_version_of_its_own_loads_from_plain_tensors(tmp_path: Path) -> None:
    import torchvision
    from safetensors.torch import save_file

    model = torchvision.models.mnasnet0_5(weights=None)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "m.safetensors")
    loaded = load_model(str(tmp_path / "m.safetensors"), arch="torchvision/mnasnet0_5")
    assert all(torch.equal(tensor, loaded.module.state_dict()[name]) for name, tensor in model.state_dict().items())
