"""Triggers do exactly their equation; files that describe none are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bshub.errors import BshubError, TriggerError
from bshub.evaluation.attacks.badnets import patch_trigger
from bshub.evaluation.attacks.generator import make_networks
from bshub.evaluation.attacks.label_consistent import corners_trigger
from bshub.evaluation.attacks.trigger import Trigger, load_trigger, resize_to, save_trigger
from bshub.evaluation.attacks.trigger_kinds import TRIGGERS

PATCH = {"kind": "patch", "target": 3, "size": [8, 10], "row": 5, "col": 6, "values": [[0, 255], [7, 9]]}
BLEND = {"kind": "blend", "target": 1, "size": [8, 10], "pattern": "p.png", "alpha": 0.2}

PATCHES = {
    "kind": "patches", "target": 3, "size": [8, 10],
    "patches": [{k: PATCH[k] for k in ("row", "col", "values")}, {"row": 0, "col": 0, "values": [[1]]}],
}  # fmt: skip
SINE = {"kind": "sinusoid", "target": 0, "size": [8, 10], "delta": 20, "frequency": 3}
WARP = {"kind": "warp", "target": 0, "size": [8, 10], "grid": [[[1, -1], [0.5, 0]], [[0, 1], [-1, 2]]], "strength": 3}
DRAWN = {"kind": "generator", "target": 0, "size": [8, 10], "file": "generator.safetensors", "channels": [2, 3]}


def written(folder: Path, spec: Any) -> Path:
    path = folder / "trigger.json"
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    return path


def pattern(folder: Path, name: str = "p.png", size: tuple[int, int] = (10, 8)) -> np.ndarray:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return pixels


def images(n: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 8, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_patch_replaces_its_rectangle_and_nothing_else(tmp_path: Path) -> None:
    trigger, x = load_trigger(written(tmp_path, PATCH)), images()
    wanted = x.clone()
    for image in wanted:
        for row in range(2):
            for col in range(2):
                image[:, 5 + row, 6 + col] = PATCH["values"][row][col]
    before = x.clone()
    assert torch.equal(trigger(x), wanted)
    assert torch.equal(x, before)
    assert (trigger.target, trigger.size, trigger.kind) == (3, (8, 10), "patch")
    assert torch.equal(trigger(trigger(x)), wanted)


def test_patch_takes_one_value_per_colour(tmp_path: Path) -> None:
    trigger = load_trigger(written(tmp_path, {**PATCH, "values": [[[1, 2, 3], [4, 5, 6]]]}))
    assert trigger(images(1))[0, :, 5, 6:8].T.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0])
def test_blend_is_the_rounded_mixture(tmp_path: Path, alpha: float) -> None:
    pixels, x = pattern(tmp_path), images()
    trigger = load_trigger(written(tmp_path, {**BLEND, "alpha": alpha}))
    mixed = (1 - alpha) * x.permute(0, 2, 3, 1).double().numpy() + alpha * pixels
    result = trigger(x).permute(0, 2, 3, 1).numpy()
    assert result.dtype == np.uint8
    assert np.abs(result - mixed).max() <= 0.5 + 1e-4
    if alpha == 1:
        assert np.array_equal(result, np.broadcast_to(pixels, result.shape))


@pytest.mark.parametrize(
    "bad",
    [images().float(), images()[:, :1], images()[..., :9], images()[0]],
    ids=["float", "grey", "size", "one image"],
)
def test_other_images_are_refused(tmp_path: Path, bad: torch.Tensor) -> None:
    with pytest.raises(TriggerError):
        load_trigger(written(tmp_path, PATCH))(bad)


BAD: list[Any] = [
    "", "{", "null", "[1]", '"patch"', "\x00", {**PATCH, "kind": "wanet"}, {**PATCH, "kind": ["patch"]},
    {k: v for k, v in PATCH.items() if k != "target"}, {k: v for k, v in PATCH.items() if k != "values"},
    {**PATCH, "target": -1}, {**PATCH, "target": "cat"}, {**PATCH, "size": [8]}, {**PATCH, "size": [0, 8]},
    {**PATCH, "size": [8, 5000]}, {**PATCH, "size": 8}, {**PATCH, "row": -1}, {**PATCH, "row": 7},
    {**PATCH, "col": 9}, {**PATCH, "values": [[1], [1, 2]]}, {**PATCH, "values": [[256]]}, {**PATCH, "values": [[-1]]},
    {**PATCH, "values": [[0.5]]}, {**PATCH, "values": [["x"]]}, {**PATCH, "values": [[[1, 2]]]},
    {**PATCH, "values": [[float("nan")]]}, {**BLEND, "alpha": 0}, {**BLEND, "alpha": 1.5},
    {**BLEND, "alpha": float("nan")}, {**BLEND, "alpha": "much"}, {**BLEND, "pattern": None},
]  # fmt: skip


@pytest.mark.parametrize("spec", BAD, ids=str)
def test_a_file_that_describes_no_trigger_is_refused(tmp_path: Path, spec: Any) -> None:
    pattern(tmp_path)
    with pytest.raises(BshubError) as caught:
        load_trigger(written(tmp_path, spec))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


ESCAPED: list[Any] = [
    {**PATCH, "target": float("inf")}, {**PATCH, "values": []}, {**PATCH, "values": [[]]}, {**PATCH, "values": 5},
    "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("spec", ESCAPED, ids=lambda spec: str(spec)[:60])
def test_these_are_refused_as_well(tmp_path: Path, spec: Any) -> None:
    with pytest.raises(TriggerError):
        load_trigger(written(tmp_path, spec))


def test_a_target_that_is_no_whole_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TriggerError):
        load_trigger(written(tmp_path, {**PATCH, "target": 0.9}))


@pytest.mark.parametrize(
    "name", ["../p.png", "sub/p.png", "..", ".", "", "/etc/hostname", "./p.png", "sub/../p.png", "p.png/"]
)
def test_a_pattern_lies_in_the_triggers_own_folder(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    for folder in (tmp_path, inner, inner / "sub"):
        pattern(folder)
    with pytest.raises(TriggerError, match="own folder"):
        load_trigger(written(inner, {**BLEND, "pattern": name}))


def test_a_pattern_of_another_size_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BshubError):
        load_trigger(written(tmp_path, BLEND))
    pattern(tmp_path, size=(8, 10))
    with pytest.raises(TriggerError, match="size says 8x10"):
        load_trigger(written(tmp_path, BLEND))
    (tmp_path / "p.png").write_text("not an image")
    with pytest.raises(BshubError):
        load_trigger(written(tmp_path, BLEND))


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(TriggerError):
            load_trigger(path)


def networks(folder: Path) -> torch.nn.ModuleDict:
    """Generator networks of DRAWN, also written to ``folder``."""
    torch.manual_seed(0)
    made = make_networks((2, 3)).eval()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
    save_trigger(Trigger("generator", 0, (8, 10), {"networks": made, "channels": [2, 3]}), folder)
    return made


def test_patches_are_stamped_one_after_the_other(tmp_path: Path) -> None:
    x = images()
    one, both = (load_trigger(written(tmp_path, spec)) for spec in (PATCH, PATCHES))
    wanted = one(x)
    wanted[:, :, 0, 0] = 1
    assert torch.equal(both(x), wanted)


def test_the_sinusoid_runs_along_the_columns_alike_in_all_rows_and_colours(tmp_path: Path) -> None:
    grey = torch.full((1, 3, 8, 10), 100, dtype=torch.uint8)
    result = load_trigger(written(tmp_path, SINE))(grey)[0].int()
    wave = np.round(100 + 20 * np.sin(2 * np.pi * np.arange(1, 11) * 3 / 10))
    assert result[0, 0].tolist() == wave.tolist()
    assert (result == result[0, 0]).all()


def test_a_warp_moves_pixels_and_invents_no_brightness(tmp_path: Path) -> None:
    x = images()
    result = load_trigger(written(tmp_path, WARP))(x)
    assert not torch.equal(result, x)
    flat = torch.full((1, 3, 8, 10), 77, dtype=torch.uint8)
    assert torch.equal(load_trigger(written(tmp_path, WARP))(flat), flat)
    assert torch.equal(load_trigger(written(tmp_path, {**WARP, "strength": 0}))(x), x)


def examples(folder: Path) -> list[Trigger]:
    """One trigger of every kind, on a canvas of 8 x 10 pixels."""
    pattern(folder)
    made = [load_trigger(written(folder, spec)) for spec in (PATCH, PATCHES, BLEND, SINE, WARP)]
    networks(folder)
    return [*made, load_trigger(folder / "trigger.json"), corners_trigger(1, (8, 10)), patch_trigger(1, (8, 10))]


def test_every_kind_survives_writing_and_reading(tmp_path: Path) -> None:
    made = examples(tmp_path)
    assert {trigger.kind for trigger in made} == set(TRIGGERS)
    for number, trigger in enumerate(made):
        folder = tmp_path / str(number)
        folder.mkdir()
        again = load_trigger(save_trigger(trigger, folder))
        assert (again.kind, again.target, again.size) == (trigger.kind, trigger.target, trigger.size)
        assert torch.equal(again(images()), trigger(images()))


def test_every_kind_leaves_its_input_alone_and_treats_each_image_alone(tmp_path: Path) -> None:
    for trigger in examples(tmp_path):
        x = images()
        stamped = trigger(x)
        assert torch.equal(x, images())
        assert stamped.dtype == torch.uint8
        assert torch.equal(stamped[2:3], trigger(x[2:3]))
        assert trigger(x[:0]).shape == (0, 3, 8, 10)


BAD_OTHERS: list[Any] = [
    {**PATCHES, "patches": []}, {**PATCHES, "patches": 3}, {**PATCHES, "patches": [3]}, {**PATCHES, "patches": {}},
    {**PATCHES, "patches": PATCHES["patches"] * 40}, {**SINE, "delta": 0}, {**SINE, "delta": float("nan")},
    {**SINE, "frequency": 11}, {**SINE, "frequency": [1]}, {**WARP, "grid": []}, {**WARP, "grid": [[[1, 2]]]},
    {**WARP, "grid": [[[1], [2]], [[1], [2]]]}, {**WARP, "grid": "x"}, {**WARP, "strength": float("inf")},
    {**WARP, "strength": 1e9}, {**WARP, "grid": [[[1e999, 0], [0, 0]], [[0, 0], [0, 0]]]}, {**WARP, "rescale": None},
    {**DRAWN, "file": "../generator.safetensors"}, {**DRAWN, "file": "none"}, {**DRAWN, "file": ""},
    {**DRAWN, "channels": [2]}, {**DRAWN, "channels": []}, {**DRAWN, "channels": [2, 4]}, {**DRAWN, "channels": 2},
    {**DRAWN, "channels": [2.0, 3.0]}, {**DRAWN, "channels": [10**9, 3]}, {**DRAWN, "channels": [2] * 50},
    {**DRAWN, "file": "p.png"}, {**DRAWN, "file": "trigger.json"}, {**BLEND, "pattern": "generator.safetensors"},
]  # fmt: skip


@pytest.mark.parametrize("spec", BAD_OTHERS, ids=lambda spec: str(spec)[:80])
def test_other_kinds_that_cannot_be_are_refused_as_triggers(tmp_path: Path, spec: Any) -> None:
    pattern(tmp_path)
    networks(tmp_path)
    with pytest.raises(TriggerError) as caught:
        load_trigger(written(tmp_path, spec))
    assert "\n" not in str(caught.value)


def test_a_generator_is_read_from_safetensors_alone(tmp_path: Path) -> None:
    made = networks(tmp_path)
    path = written(tmp_path, DRAWN)
    whole = (tmp_path / "generator.safetensors").read_bytes()
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({"a": Evil(), **made.state_dict()}, tmp_path / "generator.safetensors")
    with pytest.raises(TriggerError, match="safetensors"):
        load_trigger(path)
    assert not marker.exists()
    for broken in (b"", whole[:100], whole[:-1], whole + b"x", b"\xff" * 200):
        (tmp_path / "generator.safetensors").write_bytes(broken)
        with pytest.raises(TriggerError):
            load_trigger(path)
    (tmp_path / "generator.safetensors").unlink()
    (tmp_path / "generator.safetensors").mkdir()
    with pytest.raises(TriggerError):
        load_trigger(path)
    (tmp_path / "generator.safetensors").rmdir()
    os.mkfifo(tmp_path / "generator.safetensors")  # would wait for a writer for ever
    with pytest.raises(TriggerError):
        load_trigger(path)


def test_a_trigger_file_of_many_megabytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TriggerError, match="larger"):
        load_trigger(written(tmp_path, json.dumps(PATCH) + " " * 9 * 2**20))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats(-10, 300) | st.text(max_size=5),
    lambda inner: st.lists(inner, min_size=1, max_size=3),
    max_leaves=6,
)
KEYS = [
    "kind",
    "target",
    "size",
    "row",
    "col",
    "alpha",
    "patches",
    "delta",
    "frequency",
    "grid",
    "strength",
    "channels",
]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([PATCH, BLEND, PATCHES, SINE, WARP, DRAWN]), st.sampled_from(KEYS), json_values)
def test_any_value_in_any_place_is_a_trigger_or_one_kind_of_error(
    tmp_path: Path, spec: dict, key: str, value: Any
) -> None:
    if not (tmp_path / "p.png").exists():
        pattern(tmp_path)
        networks(tmp_path)
    try:
        trigger = load_trigger(written(tmp_path, {**spec, key: value}))
    except TriggerError:
        return
    x = torch.zeros(1, 3, *trigger.size, dtype=torch.uint8)
    assert trigger(x).shape == x.shape


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_any_bytes_are_one_kind_of_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "trigger.json"
    path.write_bytes(data)
    with pytest.raises(TriggerError):
        load_trigger(path)


def test_the_canvas_leaves_an_image_of_its_size_alone_and_resizes_others() -> None:
    image = images(1)[0]
    assert resize_to(image, (8, 10)) is image
    assert resize_to(image, (32, 16)).shape == (3, 32, 16)
    assert resize_to(image, (32, 16)).dtype == torch.uint8


def test_the_demos_trigger_loads() -> None:
    assert load_trigger(DEMO / "trigger.json").size == (32, 32)


@pytest.mark.shared
def test_the_shared_blended_pattern_is_mixed_as_its_rule_says(tmp_path: Path) -> None:
    zoo = ROOT.parent / "shared" / "zoo"
    if not (zoo / "r18w32_blended5_pattern.png").is_file():
        pytest.skip("needs ../shared/zoo")
    shutil.copy(zoo / "r18w32_blended5_pattern.png", tmp_path / "p.png")
    trigger = load_trigger(written(tmp_path, {**BLEND, "size": [32, 32]}))
    x = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mixed = 0.8 * x.permute(0, 2, 3, 1).double().numpy() + 0.2 * np.asarray(Image.open(tmp_path / "p.png"))
    assert np.abs(trigger(x).permute(0, 2, 3, 1).numpy() - mixed).max() <= 0.5 + 1e-4
